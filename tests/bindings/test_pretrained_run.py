"""A checkpoint from disk, with its own tokenizer, fine-tuned by budgeted clients."""

import json

import numpy as np
import pytest
from byte_tokenizer import byte_tokenizer
from stock_models import CAUSAL, config_of

from fedmoe_core.config.run_config import Config
from fedmoe_core.data.tokenizing import pretrained_tokenizer
from fedmoe_core.simulation import run as simulate

WORDS = ["river", "stone", "light", "winter", "garden", "letter", "music", "paper"]


def text_of(rng):
    return " ".join(rng.choice(WORDS, 40))


@pytest.fixture
def corpus(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "notes.jsonl"
    rows = [{"text": text_of(rng), "client": f"owner {n % 3}"} for n in range(90)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def save_checkpoint(folder, family):
    """A fresh tiny model and a tokenizer of its own: another alphabet order and another end token than ours."""
    tokenizer = byte_tokenizer(WORDS)
    config = config_of(family)
    config.vocab_size = tokenizer.get_vocab_size()
    CAUSAL[family](config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    return tokenizer


@pytest.mark.parametrize("family", sorted(CAUSAL))
def test_a_checkpoint_is_read_with_its_own_tokenizer_and_not_warmed_up(family, corpus, tmp_path):
    tokenizer = save_checkpoint(tmp_path / "model", family)
    found = pretrained_tokenizer(str(tmp_path / "model"))
    assert found.end_id == tokenizer.token_to_id("</s>")
    stages = []
    config = Config.load(
        None,
        [
            *(f"data=jsonl:{corpus}", f"model={tmp_path / 'model'}", f"out={tmp_path / 'run'}", "threads=1"),
            *("clients=3", "rounds=2", "train.batch_size=2", "train.seq_len=16", "train.local_steps=2"),
            *("budgets=experts=50%", "train.lr=1e-2", f"cache={tmp_path / 'cache'}"),
        ],
    )

    class Listener(simulate.NullObserver):
        def on_stage(self, text):
            stages.append(text)

    summary = simulate.run(config, observer=Listener())
    assert not any("warm-up" in stage for stage in stages)
    assert summary["loss_after"] < summary["loss_before"]
    assert summary["budget_violations"] == 0


def test_a_checkpoint_without_tokenizer_is_refused_by_name(corpus, tmp_path):
    save_checkpoint(tmp_path / "model", "olmoe")
    (tmp_path / "model" / "tokenizer.json").unlink()
    config = Config.load(None, [f"data=jsonl:{corpus}", f"model={tmp_path / 'model'}", f"out={tmp_path / 'run'}"])
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        simulate.run(config)
