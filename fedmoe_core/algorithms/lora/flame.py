"""FLAME (arXiv 2506.16600): adapters on all experts, fewer experts per token on weaker clients, means by activation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedmoe_core.algorithms.base import EachAlone, NextModel, kept
from fedmoe_core.algorithms.largest_fit import resident_plan
from fedmoe_core.algorithms.lora.factors import flame_rescale, flame_share
from fedmoe_core.config.systems import Equation, System
from fedmoe_core.messages.plan import ExpertPlan, Extras
from fedmoe_core.messages.result import LocalResult
from fedmoe_core.messages.update import ClientUpdate, Weights
from fedmoe_core.server.means import Sums, modular_mean
from fedmoe_core.server.state import Population, ServerState


@dataclass(frozen=True)
class Flame(EachAlone):
    """Every client holds every expert and trains full-rank adapters on all; its budget decides how many a token meets.

    It saves arithmetic, but neither memory nor traffic.
    """

    card: ClassVar[System] = System(
        name="flame",
        title="FLAME",
        paper="Le et al., FLAME, arXiv 2506.16600",
        equations=(
            Equation("adapter", "N", "h = s_i sum over the top k_i of R^j (W^j x + B^j A^j x), W frozen"),
            Equation("s_i", "N", "learnable, starts at k / k_i and stays with the client"),
            Equation("gamma", "N", "|D_i| (a_i^j / S_i)^t over its sum among clients; t = 0 is FedAvg"),
            Equation("s_i, by layer", "E", "one scalar for each MoE layer"),
            Equation("k_i", "E", "the largest k whose local steps the client's budget pays"),
            Equation("router", "E", "trained and averaged by |D_i|; the paper's own is not known to us"),
        ),
        approximated=(
            "a budget in experts cannot be kept, since every expert is resident; such a client gets its share of k and "
            "the run is shown as not inside the budgets",
            "the trunk follows train.trunk, as in every other system",
        ),
    )

    adapters = "shared"

    def plan_client(self, state: ServerState, client: int) -> ExpertPlan:
        """Plan all experts, k_i per token, each layer's output times s_i."""
        spec = self.population.spec
        gain_L = state.memory.get(f"gain/{client}", torch.ones(spec.num_layers))

        def extras_of(_: Population, k: int) -> Extras:
            return Extras(out_scale_L=tuple((gain_L * flame_rescale(spec.top_k, k)).tolist()))

        return resident_plan(self.population, state, client, spec.top_k, extras_of, by_k=True)

    def client(self, plan: ExpertPlan, result: LocalResult) -> Weights:
        """Weigh adapters by |D_i| (a_i^j / S_i)^t; s_i over its start stays with the client."""
        samples, spec = self.population.sample_weight(plan.client), self.population.spec
        active_LE = flame_share(
            result.profile.rows_LE,
            steps=len(result.losses),
            tokens=self.population.costs.tokens,
            samples=samples,
            temperature=self.population.config.lora.temperature,
        )
        scale_L = torch.stack([result.kept[key] for key in spec.keys_of("out_scale")])
        return Weights(
            experts_LE=active_LE * plan.trainable_LE,
            routers_LE=samples * plan.trainable_LE,
            gate=samples,
            private={"gain": scale_L / flame_rescale(spec.top_k, plan.top_k)},
            metrics={"k": plan.top_k, "scale": float(scale_L.mean())},
        )

    def apply(self, state: ServerState, sums: Sums, updates: Sequence[ClientUpdate]) -> NextModel:
        """Average adapters by gamma, routers and trunk by |D_i|; an expert that no client activated stays."""
        return modular_mean(sums, state.params, "fedavg"), {**state.memory, **kept(updates, "gain")}
