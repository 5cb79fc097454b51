"""HFedMoE on rank-8 adapters over a model from disk, plain and in four bits, and what of it peft loads afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from peft import PeftModel
from stock_models import batch_of, relative, stock_loss
from tiny_corpus import write_text
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from fedmoe_bindings.peft.export import export_run, read_run
from fedmoe_bindings.peft.fuse import fuse_lora
from fedmoe_bindings.transformers import TransformersAdapter
from fedmoe_core.config.run_config import Config
from fedmoe_core.layer.lora import LoraSpec
from fedmoe_core.server.state import unpack_state
from fedmoe_core.simulation import run as simulate
from fedmoe_core.simulation.directory.checkpoint import load_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose experts fit four bits, its tokenizer, and a corpus."""
    folder = tmp_path_factory.mktemp("saved")
    write_text(folder / "notes.jsonl")
    tokenizer = byte_tokenizer(["river stone light"])
    heads = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True)
    sizes = dict(vocab_size=tokenizer.get_vocab_size(), hidden_size=64, num_hidden_layers=2, intermediate_size=32)
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, **experts, tie_word_embeddings=True)).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    return folder


def ran(folder: Path, out: Path, *words: str) -> dict:
    plain = ["rounds=2", "clients=4", "threads=1", "train.seq_len=32", "train.batch_size=2", "train.local_steps=2"]
    where = [f"model={folder}", f"data=jsonl:{folder / 'notes.jsonl'}", f"out={out}", f"cache={out.parent / 'cache'}"]
    return simulate.run(Config.load(None, [*plain, *where, "eval.sequences=2", "train.lr=2e-2", *words]))


@pytest.mark.parametrize("form", ["none", "nf4"])
def test_the_papers_setup_is_one_configuration_and_peft_loads_what_it_trained(folder, form, tmp_path):
    run = tmp_path / "run"
    words = ["algorithm=hfedmoe", "train.experts=lora", "lora.rank=8", f"lora.frozen_format={form}"]
    summary = ran(folder, run, *words, "budgets=memory=40%;memory=100%")
    assert summary["loss_after"] < summary["loss_before"]
    assert summary["budget_violations"] == 0

    stock = AutoModelForCausalLM.from_pretrained(folder)
    export_run(run, stock, tmp_path / "adapter", base=str(folder))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    adapter = TransformersAdapter(AutoModelForCausalLM.from_pretrained(folder))
    adapter.add_lora(LoraSpec(8, 16.0), seed=0)
    state = unpack_state(load_checkpoint(run / "checkpoint").tensors, round=2).params
    adapter.configure(state)
    batch = batch_of()
    want = adapter.loss(batch)
    assert relative(stock_loss(model, batch), want) < 1e-5
    assert relative(stock_loss(fuse_lora(model), batch), want) < 1e-5
    assert relative(stock_loss(stock, batch), want) > 1e-4
    routers = read_run(run).routers
    assert not torch.equal(routers[0], stock.model.layers[0].mlp.gate.weight)  # they have been trained, and are written


def test_runs_that_no_adapter_holds_are_refused(folder, tmp_path):
    ran(folder, tmp_path / "whole", "algorithm=fedavg", "budgets=memory=100%", "rounds=1")
    with pytest.raises(
        ValueError, match=r"fedavg of .* has no adapters in its global model; run it with train.experts"
    ):
        read_run(tmp_path / "whole")
    config = tmp_path / "whole" / "config.toml"
    text = config.read_text().replace('experts = "whole"', 'experts = "lora"')
    config.write_text(text.replace('trunk = "frozen"', 'trunk = "fedavg"'))
    with pytest.raises(ValueError, match="has trained its trunk too, which no adapter holds"):
        read_run(tmp_path / "whole")
