"""What ``fedmoe export`` writes, loaded by transformers and peft alone, is the model that the run's report judged."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from tiny_corpus import make_config
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from fedmoe_core.algorithms.base import algorithm_class
from fedmoe_core.config.run_config import Config
from fedmoe_core.data.batches import eval_batches
from fedmoe_core.data.federated import load_data
from fedmoe_core.exporting.export import Exported, Order, export, told
from fedmoe_core.simulation import run as simulate
from fedmoe_core.simulation.observer import NullObserver
from fedmoe_core.simulation.prepare import cache_directory

SAME = 1e-4  # relative, of a held-out loss
# 12.5 % is one expert a layer on the average, so that layers differ; a learning rate at which two rounds show.
WORDS = ("eval.personal=true", "train.lr=3e-2", "warmup.steps=25", "train.local_steps=6", "model_config.expert_width=32")
BUDGETS = "budgets=memory=30%;memory=55%;memory=100%;memory=80%"
SYSTEMS = {
    "hfedmoe": (),
    "hfedmoe_plus": (),
    "fedmoe": (),
    "flex_moe": (),
    "flux": (),
    "fedavg": (),
    "random": (),
    "flame": ("lora.rank=4",),
    "hetlora": ("lora.rank=4",),
    "flexlora": ("lora.rank=4",),
    "hfedmoe-lora": ("algorithm=hfedmoe", "train.experts=lora", "lora.rank=4"),
    "hfedmoe-nf4": ("algorithm=hfedmoe", "train.experts=lora", "lora.rank=4", "lora.frozen_format=nf4"),
    "hfedmoe-trunk": ("algorithm=hfedmoe", "train.trunk=fedavg"),
}


@dataclass(frozen=True)
class Ran:
    """A finished run, and the last line of its records."""

    config: Config
    path: Path

    @property
    def last(self) -> dict:
        lines = [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]
        return [line for line in lines if line["type"] == "round"][-1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs by name, each played once."""
    make, played = make_config(tmp_path_factory.mktemp("runs"), tmp_path_factory.getbasetemp() / "shared"), {}

    def ran(name: str, *words: str) -> Ran:
        key = (name, *words)
        if key not in played:
            system = SYSTEMS.get(name, ())
            named = () if any(word.startswith("algorithm=") for word in system) else (f"algorithm={name}",)
            config = make(*WORDS, BUDGETS, *named, *system, *words, out_name=f"{name}-{len(played)}").resolved()
            simulate.run(config, observer=NullObserver())
            played[key] = Ran(config, Path(config.out))
        return played[key]

    return ran


def held_out(config: Config, client: int):
    """The batches that a client's model is judged on."""
    data = load_data(
        config.data,
        clients=config.clients,
        partition=config.partition,
        seed=config.seed,
        tokenizer=config.tokenizer,
        vocab_size=config.model_config.vocab_size,
        labels_per_class=config.warmup.labels_per_class,
        validation=algorithm_class(config.algorithm).needs_validation,
        cache=cache_directory(config),
    )
    test = data.clients[client].test
    return list(eval_batches(test, batch_size=4, seq_len=config.train.seq_len, sequences=config.eval.sequences))


@torch.no_grad()
def loss_of(model, batches) -> float:
    """Mean next-token loss of a stock model, in nats."""
    total, count = 0.0, 0
    for batch in batches:
        logits = model(input_ids=batch.tokens_SN, attention_mask=batch.mask_SN.long()).logits.double()
        predicted = batch.mask_SN[:, 1:] & batch.mask_SN[:, :-1]
        total += float(cross_entropy(logits[:, :-1][predicted], batch.tokens_SN[:, 1:][predicted], reduction="sum"))
        count += int(predicted.sum())
    return total / count


def stock(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def global_loss(model, config: Config) -> float:
    return float(np.mean([loss_of(model, held_out(config, client)) for client in range(config.clients)]))


@pytest.mark.parametrize("name", [name for name in SYSTEMS if name != "flex_moe"])
def test_the_global_model_is_the_judged_one(name, runs, tmp_path):
    ran = runs(name)
    done = export(ran.path, tmp_path / "out")
    found = global_loss(stock(tmp_path / "out"), ran.config)
    assert found == pytest.approx(ran.last["loss"], rel=SAME)
    assert done.sheet.loss == pytest.approx(ran.last["loss"], rel=SAME)
    before = json.loads((ran.path / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    assert abs(found - before) > 3 * SAME * before  # the model that federation started from would not do


@pytest.mark.parametrize("client", [0, 1])
@pytest.mark.parametrize("name", SYSTEMS)
def test_a_clients_own_model_is_the_judged_one(name, client, runs, tmp_path):
    ran = runs(name)
    recorded = ran.last["personal_loss_C"][client]
    try:
        done = export(ran.path, tmp_path / "out", Order(client=client))
    except ValueError as error:
        assert re.search(r"holds [\d, ]+ experts in its layers.* --equal-experts", str(error))
        assert not (tmp_path / "out").exists()
        done = export(ran.path, tmp_path / "out", Order(client=client, equal_experts=True))
        assert_equalised(done, recorded)
        recorded = done.sheet.loss
    model = stock(tmp_path / "out")
    assert loss_of(model, held_out(ran.config, client)) == pytest.approx(recorded, rel=SAME)
    assert model.config.num_experts == done.sheet.counts_L[0]
    assert model.config.num_experts_per_tok == done.sheet.top_k <= model.config.num_experts
    kept = json.loads((tmp_path / "out" / "fedmoe.json").read_text())["kept_experts"]
    assert kept == [np.flatnonzero(kept_E).tolist() for kept_E in done.sheet.kept_LE]
    assert getattr(model.config, "fedmoe_kept_experts", [list(range(8))] * 2) == kept


def assert_equalised(done: Exported, recorded: float) -> None:
    """The note names what the client lost; what it had was on record, and it holds no more experts in all."""
    (note,) = (note for note in done.sheet.notes if "left out" in note)
    counts, before, after = re.search(r"has (\d+) experts .* loss ([\d.]+) -> ([\d.]+)\.$", note).groups()
    assert done.sheet.counts_L == [int(counts)] * 2
    assert float(before) == pytest.approx(recorded, abs=1e-4)
    assert float(after) == pytest.approx(done.sheet.loss, abs=1e-4)
    assert note in told(done)


def test_some_clients_have_unequal_layers_and_some_fewer_experts_than_the_model_chooses(runs):
    """Else the tests above would not have tried these."""
    ledgers = [json.loads(line) for line in (runs("hfedmoe").path / "ledger.jsonl").read_text().splitlines()]
    assert ledgers
    with pytest.raises(ValueError, match="--equal-experts"):
        for client in (0, 1, 3):
            export(runs("hfedmoe").path, Path("unused"), Order(client=client))
