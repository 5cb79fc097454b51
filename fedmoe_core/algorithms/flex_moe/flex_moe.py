"""FLEX-MoE (arXiv 2512.23070): experts are assigned by fitness under load bounds, and every client keeps its own gate.

We could not obtain the paper's formulas. Tags: [N] read through published notes (the loop, the program over fitness
with load bounds and historical deficits, local gates, the feedback), [E] our explicit form of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from types import MappingProxyType
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fedmoe_core.algorithms.base import Algorithm, NextModel, kept
from fedmoe_core.algorithms.flex_moe.assignment import (
    Fitness,
    Program,
    assign_layers,
    next_deficit,
    observe,
    quality,
    scores,
)
from fedmoe_core.algorithms.own_gates import grown_gate, own_rows
from fedmoe_core.base.rng import counter_rng
from fedmoe_core.budget.limits import Cost
from fedmoe_core.budget.passes import pass_cost
from fedmoe_core.client.profiling import validate
from fedmoe_core.config.systems import Equation, System
from fedmoe_core.messages.measure import Measure
from fedmoe_core.messages.plan import ExpertPlan, Extras, ProbeContext, Reads
from fedmoe_core.messages.result import LocalResult
from fedmoe_core.messages.update import ClientUpdate, Weights
from fedmoe_core.selection.knapsack import knapsack
from fedmoe_core.server.means import Sums, dense_mean, expert_mean
from fedmoe_core.server.planning import client_allowance, plan_of_masks
from fedmoe_core.server.state import ServerState, initial_state, recall, remember

JITTER = 1e-3  # of a z-score: equal scores are told apart by a draw, not by the order of clients or the solver's taste


@dataclass(frozen=True)
class Feedback:
    """What the server remembers of the rounds so far, in its memory.

    Attributes:
        mean_LCE, tried_LCE: fitness of every client-expert pair, as ``assignment.Fitness`` of each layer.
        deficit_LE: load that an expert is owed.
        next_CLE: which client would get which expert if all clients took part in the next round.
    """

    mean_LCE: np.ndarray
    tried_LCE: np.ndarray
    deficit_LE: np.ndarray
    next_CLE: np.ndarray


@dataclass(frozen=True)
class LocalFeedback:
    """How well the trained sub-model's experts do on local data, (L, E): rows, sum of losses, number of right ones.

    l_ce = (1/|D_ce|) sum of l(x, y) over D_ce [N]. D_ce are the tokens of ``batches`` local batches that chose e. Each
    has the loss of its own prediction or, in classification, of its sequence [E].
    """

    batches: int
    measures: ClassVar[Mapping[str, Measure]] = MappingProxyType(
        {"rows": Measure("LE"), "loss": Measure("LE"), "right": Measure("LE", within="rows")}
    )
    reads: ClassVar[Reads] = "permitted"

    def __call__(self, context: ProbeContext) -> dict[str, Tensor]:
        batches = islice(context.batches(), self.batches)
        found = validate(context.adapter, batches, log_prior_C=context.log_prior_C).feedback
        tables = {"rows": found.rows_LE, "loss": found.loss_LE, "right": found.correct_LE}
        return {name: torch.from_numpy(table_LE) for name, table_LE in tables.items()}


@dataclass(frozen=True)
class FlexMoE(Algorithm):
    """The four phases of a round: assign, train with the own gate, aggregate by usage, update fitness and loads."""

    has_global_model: ClassVar[bool] = False
    wishes: ClassVar[tuple[type, ...]] = (LocalFeedback,)
    card: ClassVar[System] = System(
        name="flex_moe",
        title="FLEX-MoE",
        paper="Zhang et al., FLEX-MoE, arXiv 2512.23070",
        equations=(
            Equation("feedback", "N", "usage, accuracy and mean loss of each client-expert pair"),
            Equation("fitness", "E", "moving average of accuracy, exp(-loss) and usage share; z-scores, exploration"),
            Equation("program", "N", "assignment of experts by fitness with lower and upper load bounds"),
            Equation("program, form", "E", "a mixed-integer program with priced slack, one for each layer"),
            Equation("deficit", "E", "max(0, d + mean load - load), added to fitness as a share of the mean load"),
            Equation("gate", "N", "local, never aggregated; there is no global model"),
            Equation("experts", "N", "aggregated among the assigned, weighted by usage"),
            Equation("feature extractor", "E", "FedAvg by data volume where it trains"),
        ),
        approximated=(
            "fitness, deficit and program are our reading: we could not obtain the paper's formulas",
            "loss and accuracy are measured in a forward pass over a few local batches after training, by token; the "
            "paper's image models route whole samples",
            "all clients' gates start as the pretrained router",
        ),
    )

    def init(self, params: dict[str, Tensor]) -> ServerState:
        """Start with nothing known of any pair, so that the first assignment is a balanced draw."""
        (layers, experts), clients = self.population.every_LE.shape, len(self.population.budgets)
        mean_LCE, deficit_LE = np.zeros((layers, clients, experts)), np.zeros((layers, experts))
        next_CLE = np.zeros((clients, layers, experts), dtype=bool)
        known = Feedback(mean_LCE, np.zeros(mean_LCE.shape, dtype=np.int64), deficit_LE, next_CLE)
        return self._with_next(initial_state(params, clients), known)

    def plan(self, state: ServerState, clients: Sequence[int]) -> list[ExpertPlan]:
        """Do phase 1: the round's clients share out the experts of each layer."""
        known = recall(Feedback, state.memory)
        held_CLE = known.next_CLE
        if len(set(clients)) < len(held_CLE):
            held_CLE = self._assigned(state, known, sorted(clients))
        return [self._plan(state, client, held_CLE[client]) for client in clients]

    def personal(self, state: ServerState, client: int) -> ExpertPlan:
        """Plan the client's own gate over the experts that it would be assigned if all clients took part."""
        return self._plan(state, client, recall(Feedback, state.memory).next_CLE[client])

    def _plan(self, state: ServerState, client: int, held_LE: np.ndarray) -> ExpertPlan:
        rows = own_rows(state, self.population.spec, client)
        extras = replace(self._extras(client, held_LE, first_participation=state.visits[client] == 0), rows=rows)
        return plan_of_masks(self.population, state, client, held_LE, extras=extras)

    def client(self, plan: ExpertPlan, result: LocalResult) -> Weights:
        """End phase 2: deltas of experts by usage and of the feature extractor go up, with feedback; the gate stays."""
        most = self.population.config.train.local_steps * self.population.costs.tokens  # rows that an expert may get
        seen = [result.probed[name] for name in plan.extras.measures]
        return Weights(
            experts_LE=np.minimum(result.profile.rows_LE / most, 1.0) * plan.trainable_LE,
            routers_LE=np.zeros(plan.trainable_LE.shape),
            # The plan's surcharge holds the feedback's bytes.
            private={"gate": grown_gate(plan, result.kept), **({"feedback": torch.stack(seen)} if seen else {})},
        )

    def apply(self, state: ServerState, sums: Sums, updates: Sequence[ClientUpdate]) -> NextModel:
        """Do phases 3 and 4: theta_e += sum_c u_ce Delta / sum_c u_ce, psi by |D_c|; then fitness and deficits."""
        params = {**expert_mean(sums, state.params), **dense_mean(sums, state.params)}
        known = recall(Feedback, state.memory)
        usage_LCE, assigned_LCE = np.zeros(known.mean_LCE.shape), np.zeros(known.mean_LCE.shape, dtype=bool)
        seen_3LCE = np.zeros((3, *known.mean_LCE.shape))
        for update in updates:
            if update.profile is None:
                continue
            usage_LCE[:, update.client] = update.profile.rows_LE
            assigned_LCE[:, update.client] = update.profile.held_LE
            if "feedback" in update.private:
                seen_3LCE[:, :, update.client] = update.private["feedback"].numpy()
        rows_LCE, loss_LCE, right_LCE = seen_3LCE
        unseen_LCE = np.where(rows_LCE > 0, rows_LCE, np.nan)
        found_LCE = quality(right_LCE / unseen_LCE, loss_LCE / unseen_LCE, usage_LCE)
        rate = self.population.config.flex_moe.rate
        fitness = observe(Fitness(known.mean_LCE, known.tried_LCE), found_LCE, assigned_LCE, rate=rate)
        load_LE = np.tensordot(assigned_LCE, self._loads(), axes=(1, 0))
        deficit_LE = next_deficit(known.deficit_LE, load_LE)
        known = replace(known, mean_LCE=fitness.mean_CE, tried_LCE=fitness.tried_CE, deficit_LE=deficit_LE)
        return params, {**state.memory, **kept(updates, "gate"), **remember(known)}

    def advance(self, state: ServerState, sums: Sums, updates: Sequence[ClientUpdate]) -> ServerState:
        """Do phases 3 and 4, then assign the experts of the next round."""
        after = super().advance(state, sums, updates)
        return self._with_next(after, recall(Feedback, after.memory))

    def _with_next(self, state: ServerState, known: Feedback) -> ServerState:
        """Return the state that remembers ``known`` and the assignment of all clients that follows from it."""
        known = replace(known, next_CLE=self._assigned(state, known, range(len(state.visits))))
        return replace(state, memory={**state.memory, **remember(known)})

    def _assigned(self, state: ServerState, known: Feedback, clients: Sequence[int]) -> np.ndarray:
        """Return which client holds which expert, (C, L, E), when ``clients`` take part; nothing for the others."""
        facts, chosen = self.population, self.population.config.flex_moe
        members = list(clients)
        scores_LCE = scores(Fitness(known.mean_LCE, known.tried_LCE), state.round, exploration=chosen.exploration)
        for client in members:
            draw = counter_rng(facts.config.seed, "flex-moe", state.round, client)
            scores_LCE[:, client] += JITTER * draw.standard_normal(known.deficit_LE.shape)
        assignments = assign_layers(
            scores_LCE[:, members],
            np.stack([self._counts(client, state) for client in members], axis=1),
            self._loads()[members],
            deficit_LE=known.deficit_LE,
            program=Program(chosen.deficit_weight, chosen.delta, chosen.slack_price),
        )
        held_CLE = np.zeros(known.next_CLE.shape, dtype=bool)
        held_CLE[members] = np.stack([one.chosen_CE for one in assignments], axis=1)
        return held_CLE

    def _loads(self) -> np.ndarray:
        """n_c, the load that a client puts on each of its experts."""
        return np.array([self.population.sample_weight(client) for client in range(len(self.population.budgets))])

    def _counts(self, client: int, state: ServerState) -> np.ndarray:
        """k_c of each layer: as many experts as the client's own budget holds, spread evenly over the layers [E].

        The experts of a layer cost the same, so whichever are assigned fit too.
        """
        all_LE, first = self.population.every_LE, state.visits[client] == 0
        extras = self._extras(client, all_LE, first_participation=first)
        allowance = client_allowance(self.population, client, first_participation=first, extras=extras)
        # The nth expert of every layer is worth the same and less than the one before, so layers fill side by side.
        worth_LE = all_LE * np.arange(all_LE.shape[1], 0.0, -1.0)
        return np.asarray(knapsack(worth_LE, allowance.costs_DLE, list(allowance.free_D)).sum(axis=1))

    def _extras(self, client: int, held_LE: np.ndarray, *, first_participation: bool) -> Extras:
        """Keep the gate local; measure feedback where the client can pay for it in addition to a training step [E].

        The gate that a client starts from travels once, with the trunk.
        """
        facts, config = self.population, self.population.config
        batches, all_LE = min(config.flex_moe.feedback, config.train.local_steps), np.ones_like(held_LE)
        tokens, step = batches * facts.costs.tokens, facts.costs.step_flops(all_LE, all_LE, top_k=1)
        limit = facts.budgets[client].flops
        pays = batches > 0 and (limit is None or facts.costs.forward_flops(all_LE, tokens=tokens) + step <= limit)
        gates = facts.costs.router_bytes
        extra = Cost(bytes_down=gates if first_participation else 0)
        if pays:
            passing = pass_cost(facts.costs, held_LE, tokens=tokens)
            extra = extra.with_extra(Cost(flops=passing.flops, bytes_up=3 * 8 * held_LE.size))
        after = LocalFeedback(batches) if pays else None
        return Extras(keeps=frozenset({"router"}), after=after, surcharge=extra)
