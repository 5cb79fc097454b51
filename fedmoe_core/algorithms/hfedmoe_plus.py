"""HFedMoE+: HFedMoE with the ingredients that measured best, each a word of ``[plus]`` that an ablation can take away.

A client keeps the experts whose removal would change its loss most, measured per routed row and times its own demand.
Where its memory could not train half of all experts, it trains the best of those that it could. It spends the rest on
experts that only run, until it holds half of all. The server averages what the trainers of an expert changed. Router
rows are averaged one by one, by how much each client used the row, while every client goes on with the router that it
has trained itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from fedmoe_core.algorithms.base import Algorithm, NextModel, kept
from fedmoe_core.algorithms.hfedmoe import HFedMoE
from fedmoe_core.algorithms.own_gates import grown_gate, own_rows
from fedmoe_core.budget.limits import NOTHING, Cost
from fedmoe_core.config.run_config import Config
from fedmoe_core.config.systems import Equation, System
from fedmoe_core.messages.plan import ExpertPlan, Extras
from fedmoe_core.messages.result import LocalResult
from fedmoe_core.messages.update import ClientUpdate, Weights
from fedmoe_core.selection.importance import cumulative
from fedmoe_core.server.means import Sums
from fedmoe_core.server.planning import make_plan
from fedmoe_core.server.state import ServerState


@dataclass(frozen=True)
class HFedMoEPlus(Algorithm):
    """HFedMoE under other settings, and with what no setting of HFedMoE has.

    A client may hold frozen experts instead of trained ones, keep its own router, or leave the router frozen.
    Importance may be an activation count. An expert may be worth less where a better one says the same.
    """

    card: ClassVar[System] = System(
        name="hfedmoe_plus",
        title="HFedMoE+",
        paper="this package, after arXiv 2601.00583",
        equations=(
            Equation("importance", "E", "|s * dL/ds| per routed row, times the client's own top-k choices, per layer"),
            Equation("17", "N", "mean of the trainers' changes, by |D_c|; damped, all others vote no change"),
            Equation("frozen experts", "E", "below half of all experts, training one gives way to holding four"),
            Equation("20, row-wise", "E", "one weight for each router row; each client goes on with its own gate"),
            Equation("exploration", "E", "a held expert sometimes gives way to an absent one, by own demand; off"),
            Equation("16, 19", "N", "usage and row weights, as HFedMoE"),
        ),
    )

    asynchronous = True
    sums_alone = True

    @property
    def base(self) -> HFedMoE:
        """The HFedMoE that does everything else."""
        return HFedMoE(replace(self.population, config=as_hfedmoe(self.population.config)))

    @property
    def gate(self) -> str:
        """What becomes of routers: ``plus.gate``."""
        return self.population.config.plus.gate

    def plan(self, state: ServerState, clients: Sequence[int]) -> list[ExpertPlan]:
        """Plan the experts of largest score within each budget, the best of them trained."""
        scores, population, plus = self.scores(state), self.base.population, self.population.config.plus
        train, hold = plus.train_share, plus.hold_share
        return [
            make_plan(
                population, state, c, scores[c], train_share=train, hold_share=hold, extras=self._extras(state, c)
            )
            for c in clients
        ]

    def scores(self, state: ServerState) -> list[np.ndarray]:
        """Return one score per (layer, expert) by ``plus.importance``."""
        if self.population.config.plus.importance != "hits":
            return self.base.scores(state)
        known = [profile or self.population.prior for profile in state.profiles]
        return [cumulative(profile.hits_LE, profile.tokens_L) for profile in known]

    def _extras(self, state: ServerState, client: int) -> Extras:
        """A frozen router trains nowhere and travels once, with the trunk; a personal one goes on from its own rows."""
        if self.gate == "personal":
            return Extras(rows=own_rows(state, self.population.spec, client))
        if self.gate != "frozen":
            return Extras()
        costs = self.population.costs
        router = costs.router_bytes
        first = Cost(bytes_down=router) if state.visits[client] == 0 else NOTHING
        return Extras(keeps=frozenset({"router"}), train_router=False, surcharge=first)

    def client(self, plan: ExpertPlan, result: LocalResult) -> Weights:
        """Return HFedMoE's weights; none for a router that did not train. A personal gate is kept, its change sent."""
        weights = self.base.client(plan, result)
        if self.gate == "frozen":
            return replace(weights, routers_LE=np.zeros_like(weights.routers_LE), gate=0.0)
        if not plan.extras.rows:
            return weights
        return replace(weights, private={"gate": grown_gate(plan, result.deltas, deltas=True)})

    def apply(self, state: ServerState, sums: Sums, updates: Sequence[ClientUpdate]) -> NextModel:
        """Apply the aggregation of HFedMoE; a router without weight keeps its bits, and a client its own gate."""
        params, _ = self.base.apply(state, sums, updates)
        return params, {**state.memory, **kept(updates, "gate")}


def as_hfedmoe(config: Config) -> Config:
    """Return the configuration in HFedMoE's words: what ``[plus]`` says of selection and aggregation.

    Taylor importance goes without eq. 14's penalty, which was measured to work against the choice (the KL term alone
    correlates with true importance at +.64 to +.81); ``s`` and ``ib`` are exactly the paper's.
    """
    plus = config.plus
    score = "taylor" if plus.importance == "hits" else plus.importance
    rule = config.selection
    if plus.importance == "taylor":
        rule = replace(rule, beta=0.0, beta_change=0.0)
    gate = plus.gate if plus.gate == "normalized" else "row-wise"
    return replace(
        config,
        selection=replace(rule, score=score, explore=plus.explore),
        aggregation=replace(config.aggregation, experts=plus.mean, gate=gate),
    )
