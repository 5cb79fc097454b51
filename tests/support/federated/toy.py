"""An algorithm that means nothing and uses everything: memory, own rows, served experts, probes, validation, gates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fedmoe_core.algorithms.base import Algorithm, NextModel
from fedmoe_core.budget.limits import Cost
from fedmoe_core.config.run_config import Config
from fedmoe_core.layer.router_loss import SwitchBalance
from fedmoe_core.messages.measure import Measure
from fedmoe_core.messages.plan import ExpertPlan, Extras, ProbeContext, Reads
from fedmoe_core.messages.result import LocalResult
from fedmoe_core.messages.update import ClientUpdate, Weights
from fedmoe_core.server.means import Sums, expert_mean
from fedmoe_core.server.planning import plan_of_masks
from fedmoe_core.server.state import ServerState


@dataclass(frozen=True)
class Profile:
    """Forward passes of the whole global model before training: the router's probability of every expert."""

    steps: int
    measures: ClassVar[Mapping[str, Measure]] = MappingProxyType({"mass": Measure("LE")})
    reads: ClassVar[Reads] = "all"

    def __call__(self, context: ProbeContext) -> dict[str, Tensor]:
        context.adapter.configure(context.params)
        total = torch.zeros(context.adapter.spec.num_layers, context.adapter.spec.num_experts, dtype=torch.float64)
        for _, batch in zip(range(self.steps), context.batches(), strict=False):
            context.adapter.evaluate(batch, with_stats=True)
            total += torch.stack([layer.last_stats.prob_sum_E for layer in context.adapter.moe])
        return {"mass": total}


@dataclass(frozen=True)
class TrainedNorm:
    """How large each layer's trained experts are together."""

    measures: ClassVar[Mapping[str, Measure]] = MappingProxyType({"norm": Measure("L")})
    reads: ClassVar[Reads] = "permitted"

    def __call__(self, context: ProbeContext) -> dict[str, Tensor]:
        return {"norm": torch.stack([layer.w_in.detach().norm().double() for layer in context.adapter.moe])}


@dataclass(frozen=True)
class Toy(Algorithm):
    """Client c holds every second expert; the others are served by the one merged expert of their layer."""

    needs_validation = True
    has_global_model = False
    wishes = (Profile, TrainedNorm, SwitchBalance)

    def plan(self, state: ServerState, clients: Sequence[int]) -> list[ExpertPlan]:
        return [self._plan(state, client) for client in clients]

    def _plan(self, state: ServerState, client: int) -> ExpertPlan:
        spec, costs = self.population.spec, self.population.costs
        ids = np.arange(spec.num_experts)
        held_LE = np.tile((ids + client) % 2 == 0, (spec.num_layers, 1))
        merged = int(np.flatnonzero(held_LE[0])[-1])
        trainable_LE = held_LE & (ids != merged)
        alias_LE = np.where(held_LE, -1, merged)
        rows: dict[str, Mapping[int, Tensor]] = {}
        for layer in range(spec.num_layers):
            for name in ("w_in", "w_out"):
                key = f"moe.{layer}.{name}"
                rows[key] = {merged: state.params[key][[merged, *np.flatnonzero(~held_LE[layer])]].mean(dim=0)}
            gate_EH = state.memory.get(f"gate/{client}/{layer}")
            if gate_EH is not None:
                rows[f"moe.{layer}.router"] = dict(enumerate(gate_EH))
        everything_LE = np.ones_like(held_LE)
        steps = 2
        profiling = Cost(
            memory_bytes=costs.forward_memory(everything_LE),
            flops=costs.forward_flops(everything_LE, tokens=steps * costs.tokens),
            bytes_up=8 * spec.num_layers,
        )
        return plan_of_masks(
            self.population,
            state,
            client,
            held_LE,
            trainable_LE,
            extras=Extras(
                rows=rows,
                alias_LE=alias_LE,
                surcharge=profiling,
                before=Profile(steps),
                after=TrainedNorm(),
                aux=SwitchBalance(0.01, served_only=True),
                validate=True,
                keeps=frozenset({"router"}),
            ),
        )

    def client(self, plan: ExpertPlan, result: LocalResult) -> Weights:
        samples = self.population.sample_weight(plan.client)
        private = {"mass": result.probed["mass"]}
        for layer, trained_E in enumerate(plan.trainable_LE):
            key = f"moe.{layer}.router"
            given = plan.extras.rows.get(key)
            start = self.population.spec.hidden_size
            gate_EH = (
                torch.stack([given[e] for e in range(len(given))]) if given else torch.zeros(len(trained_E), start)
            )
            gate_EH = gate_EH.clone()
            gate_EH[np.flatnonzero(trained_E)] = result.kept[key]
            private[f"gate/{layer}"] = gate_EH
        return Weights(
            experts_LE=samples * plan.trainable_LE,
            routers_LE=np.zeros(plan.trainable_LE.shape),
            private=private,
            metrics={"validation": result.validation.loss_sum / result.validation.count},
        )

    def apply(self, state: ServerState, sums: Sums, updates: Sequence[ClientUpdate]) -> NextModel:
        memory = dict(state.memory)
        for update in updates:
            for name, tensor in update.private.items():
                kind, _, layer = name.partition("/")
                memory[f"{kind}/{update.client}/{layer}".rstrip("/")] = tensor
            if update.validation_profile is not None:
                memory[f"rows/{update.client}"] = torch.from_numpy(update.validation_profile.rows_LE)
        params = {**state.params, **expert_mean(sums, state.params)}
        return params, memory


class Outspoken(Toy):
    """The same, with a name and an importance of its own."""

    def importance(self, state: ServerState) -> np.ndarray:
        return np.full((self.population.spec.num_layers, self.population.spec.num_experts), state.round / 8)

    @classmethod
    def label(cls, config: Config) -> str:
        return f"outspoken over {config.rounds} rounds"
