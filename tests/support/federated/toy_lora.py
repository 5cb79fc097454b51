"""Algorithms that mean nothing and train adapters: in the global state, of many ranks, and only for a round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedmoe_core.algorithms.base import Algorithm, NextModel
from fedmoe_core.algorithms.lora.factors import Factors, resize
from fedmoe_core.config.run_config import Config
from fedmoe_core.layer.lora import FACTORS, LoraSpec
from fedmoe_core.messages.plan import ExpertPlan, Extras
from fedmoe_core.messages.result import LocalResult
from fedmoe_core.messages.update import ClientUpdate, Weights
from fedmoe_core.server.means import Sums, dense_mean, expert_mean, gate_mean
from fedmoe_core.server.planning import plan_of_masks
from fedmoe_core.server.state import ServerState

RANK = 4


@dataclass(frozen=True)
class ToyLora(Algorithm):
    """Adapters in the state: client c trains c + 1 ranks of those of every second expert, and an output scale."""

    @classmethod
    def lora(cls, config: Config) -> LoraSpec | None:
        return LoraSpec(RANK, alpha=8.0)

    def plan(self, state: ServerState, clients: Sequence[int]) -> list[ExpertPlan]:
        spec = self.population.spec
        held_LE = np.ones((spec.num_layers, spec.num_experts), dtype=bool)
        trainable_LE = np.tile(np.arange(spec.num_experts) % 2 == 0, (spec.num_layers, 1))
        return [
            plan_of_masks(
                self.population,
                state,
                client,
                held_LE,
                trainable_LE,
                extras=Extras(
                    lora_rank=min(client + 1, RANK),
                    cached_LE=held_LE if state.visits[client] else None,
                    out_scale_L=tuple(
                        state.memory.get(f"scale/{client}", torch.full((spec.num_layers,), 1.5)).tolist()
                    ),
                ),
            )
            for client in clients
        ]

    def client(self, plan: ExpertPlan, result: LocalResult) -> Weights:
        samples = self.population.sample_weight(plan.client)
        return Weights(
            experts_LE=samples * plan.trainable_LE,
            routers_LE=samples * plan.trainable_LE,
            gate=samples,
            deltas=padded(result.deltas),
            private={"scale": torch.stack([result.kept[f"moe.{n}.out_scale"] for n in range(len(plan.trainable_LE))])},
        )

    def apply(self, state: ServerState, sums: Sums, updates: Sequence[ClientUpdate]) -> NextModel:
        memory = {**state.memory, **{f"scale/{u.client}": u.private["scale"] for u in updates if u.private}}
        params = {**state.params, **expert_mean(sums, state.params), **gate_mean(sums, state.params)}
        params |= dense_mean(sums, state.params)
        return params, memory


@dataclass(frozen=True)
class ToyRound(ToyLora):
    """Adapters of a round: their product is what the experts move by, and odd clients only look and send nothing."""

    @classmethod
    def lora(cls, config: Config) -> LoraSpec | None:
        return LoraSpec(RANK, alpha=8.0, in_state=False)

    def plan(self, state: ServerState, clients: Sequence[int]) -> list[ExpertPlan]:
        spec = self.population.spec
        held_LE = np.ones((spec.num_layers, spec.num_experts), dtype=bool)
        return [
            plan_of_masks(
                self.population,
                state,
                client,
                held_LE,
                extras=Extras(lora_rank=client + 1, keeps=frozenset({"router", "expert"} if client % 2 else ())),
            )
            for client in clients
        ]

    def client(self, plan: ExpertPlan, result: LocalResult) -> Weights:
        samples = self.population.sample_weight(plan.client)
        deltas, scale = dict(result.deltas), 8.0 / RANK
        looks = bool(plan.extras.keeps)
        for layer in range(len(plan.trainable_LE) if not looks else 0):
            for side in ("in", "out"):
                a, b = (result.kept[f"moe.{layer}.{letter}_{side}"] for letter in "ab")
                deltas[f"moe.{layer}.w_{side}"] = scale * b @ a
        weight_LE = samples * plan.trainable_LE * (not looks)
        return Weights(
            experts_LE=weight_LE,
            routers_LE=weight_LE,
            gate=0.0 if looks else samples,
            deltas=deltas,
        )


def padded(deltas: dict[str, Tensor]) -> dict[str, Tensor]:
    """Factors with zeros for the ranks that the client did not have."""
    whole = dict(deltas)
    for key in deltas:
        name = key.rpartition(".")[2]
        if name in FACTORS and name.startswith("a_"):
            other = key.removesuffix(name) + f"b_{name[2:]}"
            whole[key], whole[other] = resize(Factors(deltas[key], deltas[other]), RANK)
    return whole
