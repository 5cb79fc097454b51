"""The plain systems to beat: FedAvg with every expert or one small model, and experts by chance, count or output."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import numpy as np

from fedmoe_core.algorithms.base import EachAlone, NextModel
from fedmoe_core.algorithms.hfedmoe import HFedMoE
from fedmoe_core.base.rng import counter_rng
from fedmoe_core.budget.limits import Budget
from fedmoe_core.budget.rates import Pace
from fedmoe_core.budget.resources import RESOURCES
from fedmoe_core.config.systems import Equation, System
from fedmoe_core.messages.plan import ExpertPlan
from fedmoe_core.messages.result import LocalResult
from fedmoe_core.messages.update import ClientUpdate, Weights
from fedmoe_core.selection.importance import client_scores, cumulative, expert_scores
from fedmoe_core.selection.within_budget import choose
from fedmoe_core.server.means import Sums, modular_mean
from fedmoe_core.server.planning import make_plan, plan_everything, plan_of_masks
from fedmoe_core.server.state import ServerState


@dataclass(frozen=True)
class FedAvg(EachAlone):
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

    adapters = "optional"
    asynchronous = True
    sums_alone = True

    def plan_client(self, state: ServerState, client: int) -> ExpertPlan:
        """Give the client all experts, permitted and trainable."""
        return plan_everything(self.population, state, client)

    def client(self, plan: ExpertPlan, result: LocalResult) -> Weights:
        """Weigh every tensor by |D_c|."""
        samples = self.population.sample_weight(plan.client)
        everywhere_LE = np.where(plan.trainable_LE, samples, 0.0)
        return Weights(everywhere_LE, everywhere_LE, gate=samples)

    def apply(self, state: ServerState, sums: Sums, updates: Sequence[ClientUpdate]) -> NextModel:
        """Move each tensor by the |D_c|-weighted mean of its deltas; all clients send all, so all have voted."""
        return modular_mean(sums, state.params), None


@dataclass(frozen=True)
class OtherChoice(EachAlone):
    """HFedMoE in everything but the choice: ``worth`` says which experts a client would get; it never explores."""

    adapters = "optional"
    asynchronous = True
    sums_alone = True

    @abstractmethod
    def worth(self, state: ServerState, client: int) -> np.ndarray:
        """Return one score per (layer, expert); the largest within the budget are planned."""

    def plan_client(self, state: ServerState, client: int) -> ExpertPlan:
        """Plan the experts of most worth."""
        return make_plan(self.population, state, client, self.worth(state, client), explore_absent=False)

    def client(self, plan: ExpertPlan, result: LocalResult) -> Weights:
        """Return the weights of HFedMoE."""
        return HFedMoE(self.population).client(plan, result)

    def apply(self, state: ServerState, sums: Sums, updates: Sequence[ClientUpdate]) -> NextModel:
        """Apply the aggregation of HFedMoE."""
        return HFedMoE(self.population).apply(state, sums, updates)


@dataclass(frozen=True)
class RandomExperts(OtherChoice):
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

    def worth(self, state: ServerState, client: int) -> np.ndarray:
        """Draw the scores; they are positive, so that the budget is filled."""
        rng = counter_rng(self.population.config.seed, "random-experts", state.round, client)
        return rng.uniform(0.5, 1.0, size=self.population.every_LE.shape)


@dataclass(frozen=True)
class FedAvgSmallest(FedAvg):
    """FedAvg of the largest model that fits every client: the same experts for all, fixed before the first round.

    What a homogeneous system does under heterogeneous budgets. The server chooses by what it can know before it has
    heard any client: importance on its public data, the absolute Taylor term, measured best among the scores [E].
    """

    card: ClassVar[System] = System(
        name="fedavg_smallest",
        title="FedAvg, smallest budget",
        paper="McMahan et al. 2017, arXiv 1602.05629",
        equations=(
            Equation("algorithm 1", "P", "each tensor moves by the |D_c|-weighted mean of its deltas"),
            Equation("choice", "E", "the experts of largest public-data importance that fit every client's budget"),
        ),
        approximated=("AdamW instead of SGD on the clients, with fresh state each round",),
    )

    def plan(self, state: ServerState, clients: Sequence[int]) -> list[ExpertPlan]:
        """Plan the common experts for every client; a client of few FLOPs takes fewer steps."""
        scores_LE, held_LE = self.public_scores(), self.experts()
        return [plan_of_masks(self.population, state, c, held_LE.copy(), scores_LE=scores_LE) for c in clients]

    def public_scores(self) -> np.ndarray:
        """Return what the server's own pass over public data says of every expert, (L, E)."""
        return expert_scores(self.population.prior, "taylor", lam=1.0, beta=0.0)

    def experts(self) -> np.ndarray:
        """Choose the best experts within the least of every resource, (L, E), of a first visit, so it never changes."""
        budgets = self.population.budgets
        limits = {
            row.attribute: least_of([budget.limit(word) for budget in budgets]) for word, row in RESOURCES.items()
        }
        powers = [budget.power for budget in budgets if budget.power is not None]
        power = max(powers, key=lambda one: (one.joules_per_flop, one.joules_per_byte), default=None)
        paces = [budget.pace for budget in budgets if budget.pace is not None and budget.virtual_seconds is not None]
        rates = {field.name: least_of([getattr(pace, field.name) for pace in paces]) for field in fields(Pace)}
        pace = Pace(**rates) if paces else None
        least = Budget(**limits, power=power, pace=pace, name="the least of all clients")  # type: ignore[arg-type]
        steps, scores_LE = self.population.config.train.local_steps, self.public_scores()
        return choose(least, self.population.costs, scores_LE, client="of the smallest budget", local_steps=steps)[0]


@dataclass(frozen=True)
class MostActivated(OtherChoice):
    """FMES: keep the experts that this client's own tokens choose most often, discard the rest.

    A baseline of Flux (arXiv 2508.19078), "as FedMoE" [N]. Counts are the top-k choices of the full router, which a
    compact client measures for absent experts too; before it is heard, those of the server's public data.
    """

    card: ClassVar[System] = System(
        name="most_activated",
        title="most activated experts (FMES)",
        paper="a baseline of Flux",
        equations=(
            Equation("choice", "N", "the experts with the most activations on the client's own data, others discarded"),
            Equation("averaging", "E", "HFedMoE's, so that the choice is the only difference"),
        ),
        approximated=("activations are counted during training, one round stale, not in a separate pass",),
    )

    def worth(self, state: ServerState, client: int) -> np.ndarray:
        """Return the share of the client's tokens that chose each expert, (L, E)."""
        known = state.profiles[client] or self.population.prior
        return cumulative(known.hits_LE, known.tokens_L)


@dataclass(frozen=True)
class ReapExperts(OtherChoice):
    """Keep the experts that add most to a token that chooses them: REAP (arXiv 2510.13999), afresh in each round.

    The mean over the client's own rows of router weight times norm of the output. A row of an absent expert is worth
    what the server's pass over public data says; so is all before the client is heard.
    """

    card: ClassVar[System] = System(
        name="reap_experts",
        title="experts of largest REAP",
        paper="the pruning score of arXiv 2510.13999",
        equations=(
            Equation(
                "score", "N", "mean over the expert's rows of router weight * ||output||, on the client's own data"
            ),
            Equation("share", "E", "divided by the sum over the layer, because a budget compares layers"),
            Equation(
                "absent experts", "E", "the mean on public data; 0 where the client's own router never chooses it"
            ),
            Equation("averaging", "E", "HFedMoE's, so that the choice is the only difference"),
        ),
        approximated=(
            "measured during training, one round stale, not in a separate pass",
            "the paper prunes a trained model once, as many experts in each layer; here a budget chooses, every round",
        ),
    )

    def worth(self, state: ServerState, client: int) -> np.ndarray:
        """Return the client's REAP of each expert, as a share of its layer, (L, E)."""
        own = state.profiles[client : client + 1]
        return client_scores(own, self.population.prior, "reap", lam=1.0, beta=0.0, pooled=False)[0]


def least_of(limits: Sequence[float | None]) -> float | None:
    """Return the smallest of the limits given; None where no client has one."""
    return min((limit for limit in limits if limit is not None), default=None)
