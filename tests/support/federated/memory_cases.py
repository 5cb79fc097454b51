"""One client's round of any shape and kind, and its memory as predicted and as measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch

from fedmoe_core.algorithms.hfedmoe import TopScores
from fedmoe_core.budget.limits import Budget
from fedmoe_core.client.train import train_client
from fedmoe_core.config.run_config import Config, ModelConfig, TrainConfig
from fedmoe_core.data.batches import Batch
from fedmoe_core.layer.lora import LoraSpec
from fedmoe_core.messages.plan import Extras
from fedmoe_core.messages.result import LocalResult
from fedmoe_core.model.adapter import ModelAdapter, find_adapter
from fedmoe_core.server.planning import asked_costs, plan_of_masks
from fedmoe_core.server.state import Population, initial_state
from fedmoe_core.simulation.calibrate import calibrate


@dataclass(frozen=True)
class Case:
    """A model, a batch, a plan and what else decides a client's memory.

    Attributes:
        experts, top_k, hidden, width, layers: E, k, H, I and L of the model.
        sequences, places, vocab: of a batch.
        held, trained: share of the experts held, and of those held that train; at least one a layer.
        chosen: k', 0 = k.
        classes: of a classifier, whose batches have one padded place; 0 = a language model.
        lengths: real tokens of the sequences of each step, in turn; empty = all are full.
        train: settings of ``TrainConfig``.
        rank, declared: of the client's adapters and of the declared ones (0 = none); ``in_state``: see ``LoraSpec``.
        masked: every expert is held, whatever ``held`` says.
        per_batch: experts that each batch chooses; 0 = the plan chooses.
        asks: fields of the plan's extras.
        steps: local steps.
    """

    experts: int
    top_k: int
    hidden: int
    width: int
    layers: int = 1
    sequences: int = 2
    places: int = 32
    vocab: int = 320
    held: float = 1.0
    trained: float = 1.0
    chosen: int = 0
    classes: int = 0
    lengths: tuple[int, ...] = ()
    train: dict[str, Any] = field(default_factory=dict)
    rank: int = 0
    declared: int = 0
    in_state: bool = True
    masked: bool = False
    per_batch: int = 0
    asks: dict[str, Any] = field(default_factory=dict)
    steps: int = 2

    @property
    def tight(self) -> bool:
        """Whether the prediction should be within a tenth: full batches, every choice served, nothing left open."""
        served = self.masked or round(self.held * self.experts) >= (self.chosen or self.top_k)
        open_ended = self.per_batch or "aux" in self.asks or self.train.get("token_dropout")
        return served and not self.lengths and not open_ended

    @property
    def model(self) -> ModelConfig:
        """The small model of these sizes."""
        return ModelConfig(
            hidden_size=self.hidden,
            layers=self.layers,
            heads=2,
            kv_heads=1,
            head_dim=16,
            experts=self.experts,
            top_k=self.top_k,
            expert_width=self.width,
            vocab_size=self.vocab,
        )

    def batches(self, *, seed: int = 1) -> Iterator[Batch]:
        """One batch a step, of random tokens."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.sequences, self.places)
        for step in range(self.steps):
            mask_SN = torch.ones(shape, dtype=torch.bool)
            if self.lengths:
                mask_SN[:, self.lengths[step % len(self.lengths)] :] = False
            if self.classes:
                mask_SN[0, -1] = False
            tokens_SN = torch.randint(0, self.vocab, shape, generator=generator)
            labels_S = torch.randint(0, self.classes, shape[:1], generator=generator) if self.classes else None
            yield Batch(tokens_SN, mask_SN, labels_S)

    def masks(self) -> tuple[np.ndarray, np.ndarray]:
        """Random experts of every layer: (L, E) of those held and of those that train."""
        held_LE, trained_LE = np.zeros((2, self.layers, self.experts), dtype=bool)
        rng = np.random.default_rng(0)
        for held_E, trained_E in zip(held_LE, trained_LE, strict=True):
            order = rng.permutation(self.experts)
            count = self.experts if self.masked else max(1, round(self.held * self.experts))
            held_E[order[:count]] = True
            trained_E[order[: max(1, round(self.trained * count))]] = True
        return held_LE, trained_LE


def measure(case: Case) -> tuple[int, int]:
    """Predicted bytes of the plan, and the peak of the client's round, all of its steps."""
    train = TrainConfig(batch_size=case.sequences, seq_len=case.places, local_steps=case.steps, **case.train)
    config = replace(Config(), model_config=case.model, train=train, clients=1, budgets=("unlimited",))
    load = cast("type", find_adapter("transformers"))
    task = "classification" if case.classes else "causal_lm"
    adapter: ModelAdapter = load(
        "tiny", model_config=case.model, vocab_size=case.vocab, task=task, num_classes=case.classes
    )
    params = adapter.state()
    full = next(replace(case, lengths=(), classes=0).batches(seed=9))
    if case.classes:
        full = replace(full, labels_S=torch.zeros(case.sequences, dtype=torch.int64))
    if case.declared:
        params |= adapter.add_lora(LoraSpec(case.declared, 8.0, case.in_state), seed=0)
    padding = bool(case.lengths or case.classes)

    def costs(rank: int | None) -> Any:
        return calibrate(adapter, params, train, full, padding=padding, lora_rank=rank)

    plain = costs(case.declared if case.declared and case.in_state else None)
    population = Population(
        config,
        adapter.spec,
        (Budget(),),
        plain,
        np.ones(1),
        cast(Any, None),  # no algorithm plans here, so the run has no use for the server's own profile
        validation_tokens_C=np.array([case.steps * full.tokens_SN.numel()]),
        lora_costs=None if not case.declared else plain if case.in_state else costs(case.declared),
    )
    asks = dict(case.asks)
    if case.rank:
        asks["lora_rank"] = case.rank
    if case.per_batch:
        asks["per_batch"] = TopScores(case.per_batch, "ib", lam=0.5, beta=0.1)
    plan = plan_of_masks(
        population,
        initial_state(params, 1),
        0,
        *case.masks(),
        top_k=case.chosen or None,
        mode="backward-masked" if case.masked else "compact",
        extras=Extras(**asks),
    )
    result = train_client(
        adapter,
        params,
        plan,
        case.batches(),
        train=train,
        costs=asked_costs(population, plan.extras),
        class_shares_C=np.full(case.classes, 1 / case.classes) if case.classes else None,
        validation=lambda: list(case.batches(seed=5)),
    )
    assert isinstance(result, LocalResult), result.error
    assert len(result.losses) == case.steps
    return plan.predicted.memory_bytes, result.cost.memory_bytes
