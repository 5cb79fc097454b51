"""Models by name: the small one, directories, hub ids, and files that cannot be read."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from stock_models import VOCAB, E, stock_model
from transformers import LlamaConfig, OlmoeModel, Qwen3MoeForSequenceClassification

from fedmoe_bindings.transformers.live.adapter import TransformersAdapter, load_adapter
from fedmoe_bindings.transformers.live.load import SequenceClassifier
from fedmoe_core.config.run_config import ModelConfig
from fedmoe_core.data.batches import Batch


def test_tiny_is_the_small_qwen3_moe_and_leaves_the_global_random_state_alone():
    state = torch.get_rng_state()
    one, same, other = (load_adapter("tiny", vocab_size=300, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    spec = one.spec
    assert (spec.hidden_size, spec.num_layers, spec.num_experts) == (128, 2, 16)
    assert (spec.top_k, spec.intermediate_size) == (2, 64)
    assert all(torch.equal(a, b) for a, b in zip(one.state().values(), same.state().values(), strict=True))
    assert not torch.equal(one.state()["moe.0.w_in"], other.state()["moe.0.w_in"])
    millions = sum(p.numel() for p in load_adapter("tiny").model.parameters()) / 1e6
    assert round(millions, 2) == 1.15  # the model that was measured


@pytest.mark.parametrize("task", ["causal_lm", "classification"])
def test_load_adapter_reads_a_directory_without_network_or_noise(task, tmp_path, capfd):
    stock = stock_model("olmoe")
    stock.save_pretrained(tmp_path)
    capfd.readouterr()
    adapter = load_adapter(str(tmp_path), task=task, num_classes=3, vocab_size=VOCAB)
    assert capfd.readouterr() == ("", "")
    held = adapter.state()
    assert torch.equal(held["moe.1.w_in"], stock.state_dict()["model.layers.1.mlp.experts.gate_up_proj"])
    assert ("dense.score.weight" in held) == (task == "classification")
    if task == "classification":
        assert adapter.model.pool == "last"


def test_a_saved_classifier_keeps_its_head_when_the_classes_agree(tmp_path):
    stock = stock_model("qwen3_moe", cls=Qwen3MoeForSequenceClassification, num_labels=3)
    stock.save_pretrained(tmp_path)
    same = load_adapter(str(tmp_path), task="classification", num_classes=3)
    assert torch.equal(same.model.score.weight, stock.score.weight)
    assert load_adapter(str(tmp_path), task="classification", num_classes=5).model.score.weight.shape == (5, 16)


def test_names_and_files_that_cannot_be_loaded_are_named(tmp_path):
    with pytest.raises(
        ValueError, match="'nowhere' is not 'tiny', 'smollm2', dense:DIR, a directory that exists, or a hub id"
    ):
        load_adapter("nowhere")
    with pytest.raises(ValueError, match="not 'tiny', 'smollm2'"):
        load_adapter(str(tmp_path / "missing"))
    with pytest.raises(OSError, match="cannot be loaded") as raised:
        load_adapter(str(tmp_path))
    assert "\n" not in str(raised.value)
    LlamaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2).save_pretrained(
        tmp_path / "llama"
    )
    with pytest.raises(ValueError, match=r"\(llama\) is not a Mixture of Experts"):
        load_adapter(str(tmp_path / "llama"))
    stock_model("mixtral").save_pretrained(tmp_path / "mixtral")
    with pytest.raises(ValueError, match="61 token ids, the tokenizer 2048"):
        load_adapter(str(tmp_path / "mixtral"), vocab_size=2048)
    with pytest.raises(ValueError, match="num_classes=1"):
        load_adapter(str(tmp_path / "mixtral"), task="classification", num_classes=1)
    (tmp_path / "mixtral" / "model.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(OSError, match="cannot be loaded"):
        load_adapter(str(tmp_path / "mixtral"))


def test_an_incomplete_checkpoint_is_not_filled_with_random_weights(tmp_path):
    stock_model("mixtral").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("model.layers.1.self_attn.q_proj.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OSError, match=r"lacks the weight model.layers.1.self_attn.q_proj.weight"):
        load_adapter(str(tmp_path))


@pytest.mark.parametrize("experts", [E - 1, E + 1])
def test_a_checkpoint_of_another_number_of_experts_is_refused(tmp_path, experts):
    stock_model("mixtral").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_local_experts": experts}))
    with pytest.raises(OSError, match=rf"of shape \({E}, .*asks for \({experts}, .*get files that belong together"):
        load_adapter(str(tmp_path))


def test_pickled_weights_are_not_read(tmp_path):
    stock = stock_model("mixtral")
    stock.config.save_pretrained(tmp_path)
    torch.save(stock.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="cannot be loaded"):
        load_adapter(str(tmp_path))


def test_a_hub_id_respects_the_offline_switch():
    # HF_HUB_OFFLINE is read when the hub library is imported, hence another process
    script = "from fedmoe_bindings.transformers.live.adapter import load_adapter; load_adapter('some-owner/some-model')"
    run = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True
    )
    assert run.returncode == 1
    assert "OSError: model 'some-owner/some-model' cannot be loaded" in run.stderr.splitlines()[-1]


def test_classifier_options_that_cannot_be_are_named():
    trunk = stock_model("olmoe", cls=OlmoeModel)
    with pytest.raises(ValueError, match="pool='max'"):
        SequenceClassifier.over(trunk, num_classes=3, pool="max", seed=0)
    with pytest.raises(ValueError, match="not a classifier"):
        SequenceClassifier.over(stock_model("olmoe"), num_classes=3, pool="mean", seed=0)
    adapter = TransformersAdapter(trunk, task="classification", num_classes=3)
    with pytest.raises(ValueError, match="needs labels_S"):
        adapter.loss(Batch(torch.ones(1, 3, dtype=torch.int64), torch.ones(1, 3, dtype=torch.bool)))
    with pytest.raises(ValueError, match="top_k=9 exceeds experts=4"):
        load_adapter("tiny", model_config=ModelConfig(experts=4, top_k=9))
