"""The two ends of the scale: FedAvg with every expert, and random experts under the same budgets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedmoe_core.aggregate import Sums
from fedmoe_core.algorithms import Algorithm
from fedmoe_core.algorithms.hfedmoe import HFedMoE
from fedmoe_core.client import LocalResult
from fedmoe_core.plan import ExpertPlan
from fedmoe_core.planning import make_plan, plan_everything
from fedmoe_core.reports import failed_update, finished_update
from fedmoe_core.rng import counter_rng
from fedmoe_core.state import ServerState
from fedmoe_core.systems import Equation, System
from fedmoe_core.update import ClientUpdate


@dataclass(frozen=True)
class FedAvg(Algorithm):
    """Every client trains every expert, whatever its budget: the oracle that no budget allows (McMahan et al. 2017).

    Charged for what it needs; a run whose plans pass some budget is marked ``budgeted: false``.
    """

    card: ClassVar[System] = System(
        name="fedavg",
        title="FedAvg, all experts",
        paper="McMahan et al. 2017, arXiv 1602.05629",
        equations=(Equation("algorithm 1", "P", "each tensor moves by the |D_c|-weighted mean of its deltas"),),
        approximated=("AdamW instead of SGD on the clients, with fresh state each round",),
    )

    def plan(self, state: ServerState, clients: Sequence[int]) -> list[ExpertPlan]:
        """Give every client all experts, permitted and trainable."""
        return [plan_everything(self.population, state, client) for client in clients]

    def client(self, plan: ExpertPlan, result: LocalResult) -> ClientUpdate:
        """Weigh every tensor by |D_c|."""
        samples = self.population.sample_weight(plan.client)
        if result.profile is None:
            return failed_update(plan, result, samples)
        everywhere_LE = np.where(plan.trainable_LE, samples, 0.0)
        return finished_update(
            plan,
            result,
            samples=int(self.population.samples_C[plan.client]),
            sample_weight=samples,
            expert_weight_LE=everywhere_LE,
            router_weight_LE=everywhere_LE,
            gate_weight=samples,
        )

    def apply(self, state: ServerState, sums: Sums, updates: Sequence[ClientUpdate]) -> ServerState:
        """Move each tensor by the |D_c|-weighted mean of its deltas."""
        heard = {update.client: update.profile for update in updates if update.profile is not None}
        params = {**state.params}
        for key, old in state.params.items():
            if key in sums.numerators:
                params[key] = sums.mean(key, old, sums.round_den)
        return state.advance(params, heard, [update.client for update in updates])


@dataclass(frozen=True)
class RandomExperts(Algorithm):
    """Choose experts uniformly at random in each round, under the same budgets; all else is exactly as in HFedMoE.

    Redrawn rather than fixed per client, because a fixed draw was measured worse (global loss +.071 against +.037 nats
    under the per-contributor mean): the baseline is the better of the two.
    """

    card: ClassVar[System] = System(
        name="random",
        title="random experts",
        paper="the usual baseline",
        equations=(Equation("choice", "E", "uniform over experts, redrawn each round, under the same budgets"),),
    )

    def plan(self, state: ServerState, clients: Sequence[int]) -> list[ExpertPlan]:
        """Plan by random scores instead of importance; they are positive, so that the budget is filled."""
        plans = []
        for client in clients:
            seed, spec = self.population.config.seed, self.population.spec
            rng = counter_rng(seed, "random-experts", state.round, client)
            scores_LE = rng.uniform(0.5, 1.0, size=(spec.num_layers, spec.num_experts))
            plans.append(make_plan(self.population, state, client, scores_LE, explore_absent=False))
        return plans

    def client(self, plan: ExpertPlan, result: LocalResult) -> ClientUpdate:
        """Return the weights of HFedMoE."""
        return HFedMoE(self.population).client(plan, result)

    def apply(self, state: ServerState, sums: Sums, updates: Sequence[ClientUpdate]) -> ServerState:
        """Apply the aggregation of HFedMoE."""
        return HFedMoE(self.population).apply(state, sums, updates)
