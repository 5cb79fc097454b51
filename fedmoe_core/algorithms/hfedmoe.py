"""HFedMoE (arXiv 2601.00583): experts scored by importance, chosen under each budget, averaged over their trainers.

Equation numbers are the paper's. Tags: [N] read through published notes, [D] derived, [E] our engineering reading where
the paper is silent; ``(c, l, e)`` are client, MoE layer and expert, and the paper's set of experts is the union over
all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from fedmoe_core.algorithms.base import Algorithm, NextModel, heard
from fedmoe_core.config.run_config import Config, SelectionConfig
from fedmoe_core.config.systems import Equation, System
from fedmoe_core.messages.plan import ExpertPlan, Extras
from fedmoe_core.messages.profile import ClientProfile
from fedmoe_core.messages.result import LocalResult
from fedmoe_core.messages.update import ClientUpdate, Weights
from fedmoe_core.selection.importance import Score, client_scores, expert_scores, importance_s, usage
from fedmoe_core.selection.knapsack import select_top_n
from fedmoe_core.server.means import GateRule, Sums, dense_mean, expert_mean, gate_mean
from fedmoe_core.server.planning import make_plan, plan_of_masks
from fedmoe_core.server.state import Population, ServerState


@dataclass(frozen=True)
class TopScores:
    """HFedMoE eq. 15 per batch [N]: of the experts that the batch's tokens were routed to (E_union), over all layers,
    the ``count`` of largest score; at least one a layer, and beyond that none of negative score.

    Attributes:
        count: C_budget.
        score, lam, beta: eq. 5 ("s") or eq. 14 ("ib") with their lambda and beta, on this batch's sums.
    """

    count: int
    score: Score
    lam: float
    beta: float

    def __call__(self, profile: ClientProfile) -> np.ndarray:
        """Choose the experts, bool (L, E)."""
        scores_LE = expert_scores(profile, self.score, lam=self.lam, beta=self.beta)
        outside = min(0.0, float(scores_LE.min())) - 1.0  # below all that were reached, and never taken for its score
        return select_top_n(np.where(profile.hits_LE > 0, scores_LE, outside), self.count)


@dataclass(frozen=True)
class HFedMoE(Algorithm):
    """The paper's system in two forms of spending a budget.

    ``compact`` stores and runs only the chosen experts (a real memory bound, [E]); ``backward-masked`` is the paper's:
    full routing forward, gradients only for the chosen.
    """

    card: ClassVar[System] = System(
        name="hfedmoe",
        title="HFedMoE",
        paper="Fang et al., HFedMoE, arXiv 2601.00583",
        equations=(
            Equation("3-5", "N", "importance s: mean and largest gate value, mixed by lambda"),
            Equation("10, 11, 14", "N", "information-bottleneck score I = s - beta * KL; sum of KL = I(router; input)"),
            Equation("15", "N", "experts of largest score under a budget; exact for equal costs"),
            Equation("15, real budgets", "E", "a knapsack over bytes, traffic and count; FLOPs by steps, k' and share"),
            Equation("Taylor", "E", "importance |s * dL/ds| summed in the backward pass, instead of s"),
            Equation(
                "REAP", "N", "or the mean of s * ||output|| over the expert's rows, arXiv 2510.13999; or their sum"
            ),
            Equation("16, 17", "N", "usage, and the mean over clients above tau; on deltas, with true participation"),
            Equation("17, damped", "E", "divided by all clients of the round instead"),
            Equation("18-21", "N", "routing consistency and the importance-weighted gate, normalised or as printed"),
            Equation("schedules", "E", "lambda, beta and tau move by equal steps from the first round to the last"),
            Equation("20, row-wise", "E", "one weight for each router row"),
        ),
        approximated=(
            "compact mode (default) stores only the chosen experts; the paper's own form is selection.mode="
            "backward-masked, which bounds no forward memory",
            "eq. 14's score mixes units (a share and nats), as printed",
        ),
    )

    adapters = "optional"
    wishes: ClassVar[tuple[type, ...]] = (TopScores,)
    asynchronous = True
    sums_alone = True

    def plan(self, state: ServerState, clients: Sequence[int]) -> list[ExpertPlan]:
        """Solve eq. 15 for each client: the experts of largest score within its budget."""
        if self.chosen(state.round).reschedule == "batch":
            return [self.per_batch(state, client) for client in clients]
        scores = self.scores(state)
        return [make_plan(self.population, state, client, scores[client]) for client in clients]

    def chosen(self, number: int) -> SelectionConfig:
        """Return how experts are scored in a round: lambda and beta move by equal steps, first to last [E]."""
        rule, done = self.population.config.selection, self.progress(number)
        return replace(rule, lam=rule.lam + done * rule.lam_change, beta=rule.beta + done * rule.beta_change)

    def tau(self, number: int) -> float:
        """Return tau of eqs. 17 and 18 in a round, as lambda and beta."""
        rule = self.population.config.aggregation
        return rule.tau + self.progress(number) * rule.tau_change

    def progress(self, number: int) -> float:
        """Return the progress of the run: 0 in the first round, 1 in the last."""
        return number / max(1, self.population.config.rounds - 1)

    def per_batch(self, state: ServerState, client: int) -> ExpertPlan:
        """Solve eq. 15 again for every batch, as printed: all experts are resident, the chosen ones learn."""
        spec, chosen = self.population.spec, self.chosen(state.round)
        budget, every_LE = self.population.budgets[client], self.population.every_LE
        count = every_LE.size if budget.experts is None else budget.experts
        if count < spec.num_layers:
            raise ValueError(
                f"client {client}: experts budget {count} cannot hold one expert per MoE layer; "
                f"at least {spec.num_layers} is needed"
            )
        # A budget for the whole model leaves nothing to choose, and nothing to score (invariant 9).
        rule = TopScores(count, chosen.score, chosen.lam, chosen.beta) if count < every_LE.size else None
        return plan_of_masks(
            self.population, state, client, every_LE, mode="backward-masked", extras=Extras(per_batch=rule)
        )

    def scores(self, state: ServerState) -> list[np.ndarray]:
        """Return one score per (layer, expert) and client: by ``selection.score``."""
        rule, pooled = self.chosen(state.round), not self.population.config.privacy.clip
        return client_scores(
            state.profiles, self.population.prior, rule.score, lam=rule.lam, beta=rule.beta, pooled=pooled
        )

    @classmethod
    def label(cls, config: Config) -> str:
        """Name the system and the choices that change its meaning."""
        parts = [f"score {config.selection.score}"]
        if config.selection.mode != "compact":
            parts.append(config.selection.mode)
        if config.aggregation.experts != "participation":
            parts.append(f"{config.aggregation.experts} mean")
        if config.train.experts == "lora":
            few_bits = "" if config.lora.frozen_format == "none" else f" over {config.lora.frozen_format}"
            parts.append(f"rank {config.lora.rank}{few_bits}")
        return f"{super().label(config)} ({', '.join(parts)})"

    def client(self, plan: ExpertPlan, result: LocalResult) -> Weights:
        """Return the weights of eqs. 16, 17, 19 and 20 for what this client trained."""
        rule, samples = self.population.config.aggregation, self.population.sample_weight(plan.client)
        tau = self.tau(plan.round)
        layers = plan.trainable_LE.shape[0]
        u_LE = usage(result.profile.prob_sum_LE, result.profile.tokens_L)  # eq. 16
        s_LE = importance_s(
            result.profile.prob_sum_LE,
            result.profile.prob_max_LE,
            result.profile.tokens_L,
            lam=self.chosen(plan.round).lam,
        )  # eq. 5
        trained_LE = plan.trainable_LE if result.trained_LE is None else result.trained_LE
        passes_LE = (u_LE >= tau) & trained_LE
        votes_LE = passes_LE & (result.profile.rows_LE > 0) if rule.participation else passes_LE  # 1.3d [E]
        p_LE = u_LE * s_LE * passes_LE  # eq. 19, S_c cut to what the client holds and trains
        alpha = float(p_LE.sum()) / layers  # eq. 20; L bounds the sum, and 1/|S_global| is the server's to apply
        row_weight_LE = {
            "row-wise": p_LE,
            "normalized": alpha * trained_LE,
            "literal": alpha * trained_LE,
            "fedavg": samples * trained_LE,
        }[gate_rule(self.population)]
        return Weights(
            experts_LE=samples * votes_LE,  # eq. 17: |D_c| 1[u >= tau]
            routers_LE=np.asarray(row_weight_LE, dtype=np.float64),
            gate=samples if gate_rule(self.population) == "fedavg" else alpha,
        )

    def apply(self, state: ServerState, sums: Sums, updates: Sequence[ClientUpdate]) -> NextModel:
        """Apply eq. 17 to experts, eqs. 18-21 to gates, |D_c|-FedAvg to a trained trunk; the untrained stays."""
        rule, tau = self.population.config.aggregation, self.tau(state.round)
        layers = self.population.spec.num_layers
        s_global_LE = np.zeros_like(self.population.every_LE)
        for profile in heard(updates).values():
            s_global_LE |= (usage(profile.prob_sum_LE, profile.tokens_L) >= tau) & profile.held_LE  # eq. 18
        params = {
            **expert_mean(sums, state.params, rule=rule.experts),
            **gate_mean(
                sums,
                state.params,
                rule=gate_rule(self.population),
                s_global_size=float(s_global_LE.sum()) / layers,  # in the units of gate_weight, alpha / L
            ),
            **dense_mean(sums, state.params),
        }
        return params, None


def gate_rule(population: Population) -> GateRule:
    """Return the gate mode; "auto" is row-wise for compact clients, normalised for the paper's backward-masked ones."""
    gate = population.config.aggregation.gate
    if gate != "auto":
        return gate
    return "row-wise" if population.config.selection.mode == "compact" else "normalized"
