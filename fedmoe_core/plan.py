"""What the server decides for one client in one round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedmoe_core.budget import Budget, Cost
from fedmoe_core.costs import Mode
from fedmoe_core.rng import counter_rng, counter_seed
from fedmoe_core.selection import choose, explore, fit_flops

if TYPE_CHECKING:
    from fedmoe_core.state import Population, ServerState


@dataclass(frozen=True)
class ExpertPlan:
    """One client's part in one round: its experts, its work, and what that will cost.

    Shapes: L MoE layers, E experts per layer. Masks are boolean numpy arrays in global coordinates.

    Attributes:
        client: index of the client, 0..C-1.
        round: index of the round, from 0.
        permitted_LE: experts the client may store and run.
        trainable_LE: the permitted experts that also get a weight gradient; a subset of ``permitted_LE``.
        top_k: experts per token (k'), at most the model's own k; lowered only by a FLOP budget.
        local_steps: optimizer steps; the client also stops before the step that would pass the FLOP budget.
        seed: seed of everything random on the client in this round.
        budget: the limits that bind the client; unlimited where the algorithm ignores them (FedAvg).
        predicted: what the cost model expects; inside ``budget`` in every resource, or the plan is refused.
        first_participation: whether the frozen trunk travels to the client with this plan.
        mode: "compact" counts the permitted experts against an expert budget, "backward-masked" the trainable ones.
    """

    client: int
    round: int
    permitted_LE: np.ndarray
    trainable_LE: np.ndarray
    top_k: int
    local_steps: int
    seed: int
    budget: Budget
    predicted: Cost
    first_participation: bool = True
    mode: Mode = "compact"

    @property
    def counted_experts(self) -> int:
        """Experts that an expert budget counts."""
        return int((self.permitted_LE if self.mode == "compact" else self.trainable_LE).sum())

    def __post_init__(self) -> None:
        if self.permitted_LE.shape != self.trainable_LE.shape:
            raise ValueError(
                f"client {self.client}: permitted_LE {self.permitted_LE.shape} and trainable_LE "
                f"{self.trainable_LE.shape} differ in shape; both must be (layers, experts)"
            )
        if (self.trainable_LE & ~self.permitted_LE).any():
            raise ValueError(f"client {self.client}: a trainable expert is not permitted; trainable must be a subset")
        empty = np.flatnonzero(~self.permitted_LE.any(axis=1))
        if empty.size:
            raise ValueError(f"client {self.client}: layer {empty[0]} has no permitted expert; permit at least one")
        if over := self.budget.violations(self.predicted):
            raise ValueError(f"client {self.client}: the plan exceeds its budget ({over[0]}); plan less")


def make_plan(
    population: Population,
    state: ServerState,
    client: int,
    scores_LE: np.ndarray,
    *,
    explore_absent: bool = True,
) -> ExpertPlan:
    """The experts of largest score within the client's budget, then as much work as its FLOPs allow.

    Memory, traffic and count choose the experts (HFedMoE eq. 15 and its real-budget form); FLOPs then set local steps,
    k' and the trainable share. With ``explore_absent`` an absent expert sometimes takes the place of the least valued
    held one, in proportion to the client's own demand for it, so that no expert stays unseen for ever [E].

    Raises:
        ValueError: the budget cannot hold one expert per MoE layer or pay one step; the message says what would do.
    """
    config, costs, budget = population.config, population.costs, population.budgets[client]
    first, mode = state.visits[client] == 0, config.selection.mode
    permitted_LE, trainable_LE = choose(budget, costs, scores_LE, client=client, mode=mode, first_participation=first)
    if explore_absent and mode == "compact" and config.selection.explore > 0:
        demand_LE = (state.profiles[client] or population.prior).prob_sum_LE
        rng = counter_rng(config.seed, "explore", state.round, client)
        permitted_LE = explore(permitted_LE, demand_LE, scores_LE, chance=config.selection.explore, rng=rng)
        trainable_LE = permitted_LE
    fit = fit_flops(
        budget,
        costs,
        permitted_LE,
        trainable_LE,
        local_steps=config.train.local_steps,
        scores_LE=scores_LE,
        client=client,
    )
    predicted = costs.predict(
        permitted_LE,
        fit.trainable_LE,
        local_steps=fit.local_steps,
        top_k=fit.top_k,
        first_participation=first,
        mode=mode,
    )
    return ExpertPlan(
        client=client,
        round=state.round,
        permitted_LE=permitted_LE,
        trainable_LE=fit.trainable_LE,
        top_k=fit.top_k,
        local_steps=fit.local_steps,
        seed=counter_seed(config.seed, "client", state.round, client),
        budget=budget,
        predicted=predicted,
        first_participation=first,
        mode=mode,
    )


def plan_everything(population: Population, state: ServerState, client: int) -> ExpertPlan:
    """All experts, all steps, no limit: what FedAvg asks of every client, and is charged for."""
    config, spec = population.config, population.spec
    all_LE = np.ones((spec.num_layers, spec.num_experts), dtype=bool)
    first = state.visits[client] == 0
    return ExpertPlan(
        client=client,
        round=state.round,
        permitted_LE=all_LE,
        trainable_LE=all_LE,
        top_k=spec.top_k,
        local_steps=config.train.local_steps,
        seed=counter_seed(config.seed, "client", state.round, client),
        budget=Budget(name="unlimited"),
        predicted=population.costs.predict(
            all_LE, all_LE, local_steps=config.train.local_steps, first_participation=first
        ),
        first_participation=first,
    )
