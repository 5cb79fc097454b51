"""FedAvg of a model without experts: every client trains all of it, inside its budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from fedmoe_core.algorithms.base import EachAlone, NextModel
from fedmoe_core.algorithms.baselines import FedAvg
from fedmoe_core.base.rng import counter_seed
from fedmoe_core.config.run_config import Config
from fedmoe_core.config.systems import Equation, System, title_of
from fedmoe_core.data.rows import epoch_steps
from fedmoe_core.messages.plan import ExpertPlan
from fedmoe_core.messages.result import LocalResult
from fedmoe_core.messages.update import ClientUpdate, Weights
from fedmoe_core.server.means import Sums
from fedmoe_core.server.planning import plan_of_masks
from fedmoe_core.server.state import ServerState


@dataclass(frozen=True)
class PlainFedAvg(EachAlone):
    """FedAvg of a plain torch model (McMahan et al. 2017); a FLOP or energy budget lowers a client's local steps.

    A system of your own over a plain model inherits it: ``apply`` is the server's step.
    """

    @classmethod
    def label(cls, config: Config) -> str:
        """Return what people call it."""
        return cls.card.title if config.algorithm == cls.card.name else title_of(config.algorithm)

    card: ClassVar[System] = System(
        name="fedavg",
        title="FedAvg",
        paper="McMahan et al. 2017, arXiv 1602.05629",
        equations=(Equation("algorithm 1", "P", "each tensor moves by the |D_c|-weighted mean of its deltas"),),
    )

    asynchronous = True
    sums_alone = True

    def plan(self, state: ServerState, clients: Sequence[int]) -> list[ExpertPlan]:
        """Plan each client alone; what clients of one budget and as many steps are asked is worked out once."""
        seed, known = self.population.config.seed, dict[object, ExpertPlan]()
        plans = []
        for client in clients:
            kind = self.population.budgets[client], self.steps(client), state.visits[client] == 0
            if kind not in known:
                known[kind] = self.plan_client(state, client)
            own_seed = counter_seed(seed, "client", state.round, client)
            plans.append(replace(known[kind], client=client, seed=own_seed, budget=self.population.budgets[client]))
        return plans

    def steps(self, client: int) -> int:
        """Count the local steps that a client is asked for where its budget pays them."""
        train, rows = self.population.config.train, int(self.population.samples_C[client])
        return epoch_steps(rows, train.batch_size, train.local_epochs) or train.local_steps

    def plan_client(self, state: ServerState, client: int) -> ExpertPlan:
        """Plan the whole model, for ``train.local_epochs`` passes over its rows, else for ``train.local_steps``."""
        every_LE = self.population.every_LE
        return plan_of_masks(self.population, state, client, every_LE, local_steps=self.steps(client))

    def client(self, plan: ExpertPlan, result: LocalResult) -> Weights:
        """Weigh every tensor by |D_c|, which the update carries as its sample weight."""
        nothing_LE = np.zeros(plan.trainable_LE.shape)
        return Weights(nothing_LE, nothing_LE)

    def apply(self, state: ServerState, sums: Sums, updates: Sequence[ClientUpdate]) -> NextModel:
        """Move each tensor by the |D_c|-weighted mean of its deltas."""
        return FedAvg(self.population).apply(state, sums, updates)
