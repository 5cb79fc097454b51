"""Runs whose models are exported, and their judgement by stock models alone; no test lives here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from fedmoe_core.algorithms.base import algorithm_class
from fedmoe_core.config.run_config import Config
from fedmoe_core.data.batches import eval_batches
from fedmoe_core.simulation.prepare import read_data
from fedmoe_core.simulation.process_group import open_ranks

SAME = 1e-4  # relative, of a held-out loss
# 12.5 % is one expert a layer on the average, so that layers differ; a learning rate at which two rounds show.
WORDS = (
    "eval.personal=true",
    "train.lr=3e-2",
    "warmup.steps=25",
    "train.local_steps=6",
    "model_config.expert_width=32",
)
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
    def rounds(self) -> list[dict]:
        lines = [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]
        return [line for line in lines if line["type"] == "round"]

    @property
    def last(self) -> dict:
        return self.rounds[-1]

    def losses(self, client: int) -> list[float]:
        return [line["personal_loss_C"][client] for line in self.rounds]


def data_of(config: Config):
    """The data of a run, read again."""
    with open_ranks(1, torch.device("cpu")) as ranks:
        return read_data(config, ranks, validation=algorithm_class(config.algorithm).needs_validation)


def held_out(config: Config, client: int):
    """The batches that a client's model is judged on."""
    test = data_of(config).clients[client].test
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
