"""Models that were given as a directory keep what is theirs when they are exported, and classifiers their pooling."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from byte_tokenizer import byte_tokenizer
from exported_runs import SAME, data_of, held_out, loss_of
from peft import AutoPeftModelForCausalLM
from stock_models import CAUSAL, config_of
from tiny_corpus import SIZES, write_text, write_topics
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fedmoe_core.config.run_config import Config
from fedmoe_core.data.batches import eval_batches
from fedmoe_core.exporting.export import Order, export
from fedmoe_core.simulation import run as simulate
from fedmoe_core.simulation.observer import NullObserver

CHAT = "{% for message in messages %}{{ message['content'] }}</s>{% endfor %}"


def save_model(folder: Path, family: str, *, pad: int | None = None) -> Path:
    """A fresh tiny model with a key of its own in the configuration, generation settings, and a tokenizer."""
    tokenizer = byte_tokenizer(["river stone light"])
    config = config_of(family)
    config.vocab_size, config.pad_token_id = tokenizer.get_vocab_size(), pad
    config.made_elsewhere = {"renormalize": "share", "of": [1, 2]}
    torch.manual_seed(0)
    model = CAUSAL[family](config)
    model.generation_config.update(temperature=0.7, do_sample=True, eos_token_id=[1, 5])
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "</s>", "bos_token": "<s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(CHAT)
    return folder


def ran(model: Path, out: Path, data: str, *words: str) -> tuple[Config, dict]:
    """Play two rounds; the configuration and the last line of the records."""
    sizes = [word for word in SIZES if not word.startswith(("model_config", "warmup"))]
    where = [f"model={model}", f"data={data}", f"out={out}", f"cache={out.parent / 'cache'}"]
    more = ["clients=3", "rounds=2", "eval.personal=true", "train.lr=2e-2", "budgets=experts=50%;experts=100%"]
    config = Config.load(None, [*sizes, *where, *more, *words]).resolved()
    simulate.run(config, observer=NullObserver())
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return config, [line for line in lines if line["type"] == "round"][-1]


@pytest.mark.parametrize("family", sorted(CAUSAL))
def test_a_directory_keeps_its_settings_its_template_and_keys_that_only_others_know(family, tmp_path):
    """Qwen has a dense layer between those with experts, OLMoE does not renormalise, Mixtral has other names."""
    model = save_model(tmp_path / "model", family)
    write_text(tmp_path / "notes.jsonl")
    config, last = ran(model, tmp_path / "run", f"jsonl:{tmp_path / 'notes.jsonl'}", "algorithm=hfedmoe_plus")
    for client in (None, 0, 1):
        out = tmp_path / f"out-{client}"
        equal = client == 0  # whose layers may differ; without effect where they do not
        done = export(tmp_path / "run", out, Order(client=client, equal_experts=equal))
        found = AutoModelForCausalLM.from_pretrained(out).eval()
        losses = [loss_of(found, held_out(config, each)) for each in range(3)]
        assert np.mean(losses) == pytest.approx(last["loss"], rel=SAME) or client is not None
        assert client is None or losses[client] == pytest.approx(done.sheet.loss, rel=SAME)
        assert client != 1 or losses[1] == pytest.approx(last["personal_loss_C"][1], rel=SAME)
        assert AutoConfig.from_pretrained(out).made_elsewhere == {"renormalize": "share", "of": [1, 2]}
        assert (found.generation_config.temperature, found.generation_config.eos_token_id) == (0.7, [1, 5])
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            assert (out / name).read_bytes() == (model / name).read_bytes()
        chat = AutoTokenizer.from_pretrained(out).apply_chat_template(
            [{"role": "user", "content": "hi"}], tokenize=False
        )
        assert chat == "hi</s>"


def test_adapters_are_written_over_the_directory_that_the_run_named(tmp_path):
    model = save_model(tmp_path / "model", "mixtral")
    write_text(tmp_path / "notes.jsonl")
    words = ["algorithm=hfedmoe", "train.experts=lora", "lora.rank=4"]
    config, last = ran(model, tmp_path / "run", f"jsonl:{tmp_path / 'notes.jsonl'}", *words)
    done = export(tmp_path / "run", tmp_path / "out", Order("peft"))
    assert done.sheet.base == str(model)
    assert not (tmp_path / "out" / "base").exists()
    found = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    losses = [loss_of(found, held_out(config, client)) for client in range(3)]
    assert np.mean(losses) == pytest.approx(last["loss"], rel=SAME)


def test_a_tokenizer_whose_settings_transformers_cannot_use_is_written_as_the_run_had_it(tmp_path):
    model = save_model(tmp_path / "model", "mixtral")
    (model / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "tokenizer_class": "LlamaTokenizer"}))
    write_text(tmp_path / "notes.jsonl")
    config, _ = ran(model, tmp_path / "run", f"jsonl:{tmp_path / 'notes.jsonl'}", "rounds=1")
    export(tmp_path / "run", tmp_path / "out")
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert found("wa, is").input_ids == data_of(config).tokenizer.encode(["wa, is"])[0]
    assert found.eos_token == "</s>"


@pytest.mark.parametrize("client", [None, 0])
def test_a_classifier_is_the_judged_one_with_its_own_prior(client, tmp_path):
    """It pools the last token, as transformers does, and a client's own adds the log of its class shares."""
    model = save_model(tmp_path / "model", "mixtral", pad=0)
    write_topics(tmp_path / "topics.csv")
    config, last = ran(
        model, tmp_path / "run", f"csv:{tmp_path / 'topics.csv'}", "warmup.head_steps=20", "algorithm=hfedmoe"
    )
    done = export(tmp_path / "run", tmp_path / "out", Order(client=client, equal_experts=True))
    found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    facts = json.loads((tmp_path / "out" / "fedmoe.json").read_text())
    data = data_of(config)
    part, most = (data.test, 0) if client is None else (data.clients[client].test, config.eval.sequences)
    total, count = 0.0, 0
    for batch in eval_batches(part, batch_size=16, seq_len=config.train.seq_len, sequences=most):
        tokens_SN = batch.tokens_SN.masked_fill(~batch.mask_SN, found.config.pad_token_id)
        with torch.no_grad():
            logits = found(input_ids=tokens_SN, attention_mask=batch.mask_SN.long()).logits
        logits = logits + torch.tensor(facts.get("log_prior", [0.0] * 3))
        total += float(cross_entropy(logits, batch.labels_S, reduction="sum"))
        count += len(batch.labels_S)
    judged = last["loss"] if client is None else last["personal_loss_C"][client]
    assert total / count == pytest.approx(done.sheet.loss, rel=SAME)
    assert done.recorded == judged
    assert ("log_prior" in facts) == (client is not None)
    assert facts["class_names"] == ["0", "1", "2"]


def test_what_transformers_would_pool_elsewhere_is_refused(tmp_path):
    """The tiny model's classifier pools the mean; one whose padding is its end token pools the token before the end."""
    write_topics(tmp_path / "topics.csv")
    data = f"csv:{tmp_path / 'topics.csv'}"
    model = save_model(tmp_path / "model", "mixtral", pad=1)
    ran(model, tmp_path / "run", data, "rounds=1", "warmup.head_steps=2")
    with pytest.raises(ValueError, match="answers otherwise than the model that was judged"):
        export(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    where = [f"data={data}", f"out={tmp_path / 'tiny'}", f"cache={tmp_path / 'cache'}", "clients=3", "rounds=1"]
    simulate.run(Config.load(None, [*SIZES, *where, "warmup.head_steps=2"]), observer=NullObserver())
    with pytest.raises(ValueError, match="pool the last token"):
        export(tmp_path / "tiny", tmp_path / "out")
