"""FedAvg of a model without experts: every client trains all of it, inside its budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedmoe_core.algorithms.base import EachAlone, NextModel
from fedmoe_core.algorithms.baselines import FedAvg
from fedmoe_core.config.systems import Equation, System
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

    card: ClassVar[System] = System(
        name="fedavg",
        title="FedAvg",
        paper="McMahan et al. 2017, arXiv 1602.05629",
        equations=(Equation("algorithm 1", "P", "each tensor moves by the |D_c|-weighted mean of its deltas"),),
    )

    def plan_client(self, state: ServerState, client: int) -> ExpertPlan:
        """Plan the whole model, for ``train.local_epochs`` passes over its rows, else for ``train.local_steps``."""
        population = self.population
        train, rows = population.config.train, int(population.samples_C[client])
        steps = epoch_steps(rows, train.batch_size, train.local_epochs) or train.local_steps
        return plan_of_masks(population, state, client, population.every_LE, local_steps=steps)

    def client(self, plan: ExpertPlan, result: LocalResult) -> Weights:
        """Weigh every tensor by |D_c|, which the update carries as its sample weight."""
        nothing_LE = np.zeros(plan.trainable_LE.shape)
        return Weights(nothing_LE, nothing_LE)

    def apply(self, state: ServerState, sums: Sums, updates: list[ClientUpdate]) -> NextModel:  # type: ignore[override]
        """Move each tensor by the |D_c|-weighted mean of its deltas."""
        return FedAvg(self.population).apply(state, sums, updates)
