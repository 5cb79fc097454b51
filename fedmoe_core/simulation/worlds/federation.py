"""What the loop of rounds needs to know of a run, whatever its clients train."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from fedmoe_core.algorithms.base import Algorithm
from fedmoe_core.config.run_config import Config
from fedmoe_core.messages.plan import ExpertPlan
from fedmoe_core.model.spec import ParamSpec
from fedmoe_core.privacy.chance import Secret
from fedmoe_core.server.state import Population, ServerState
from fedmoe_core.simulation.cohorts.cutting import Group
from fedmoe_core.simulation.cohorts.training import InTurn, Task
from fedmoe_core.simulation.evaluation import HeldOut
from fedmoe_core.simulation.identity import Identity
from fedmoe_core.simulation.process_group import Ranks


@dataclass(frozen=True)
class Holdings:
    """Who has what: the part of the data that logs and reports name.

    Attributes:
        clients: names.
        names_D, counts_CD: of classes or domains, and how much of each a client has, int64.
        task: "causal_lm", "classification" or "plain".
        partition: how the data were dealt, never "auto".
    """

    clients: tuple[str, ...]
    names_D: tuple[str, ...]
    counts_CD: np.ndarray
    task: str
    partition: str


class Federation(Protocol):
    """One process's view of a run: the live model is its own, everything else is equal on all ranks."""

    @property
    def config(self) -> Config:
        """Return the resolved configuration."""
        ...

    @property
    def params(self) -> dict[str, Tensor]:
        """Return the model that federation starts from."""
        ...

    @property
    def population(self) -> Population:
        """Return the fixed facts of the clients."""
        ...

    @property
    def algorithm(self) -> Algorithm:
        """Return the system that plans, weighs and averages."""
        ...

    @property
    def ranks(self) -> Ranks:
        """Return this process among its peers."""
        ...

    @property
    def identity(self) -> Identity:
        """Return the digests of data, model and code."""
        ...

    @property
    def holdings(self) -> Holdings:
        """Return who has what."""
        ...

    @property
    def learning(self) -> tuple[ParamSpec, ...]:
        """Return the tensors that may train in this run."""
        ...

    @property
    def secret(self) -> Secret | None:
        """Return from what a private run draws its noise; None where that is the seed, or nothing is private."""
        ...

    def keeping(self, secret: Secret) -> Federation:
        """Return the same with the secret of its run."""
        ...

    def groups(self, plans: Sequence[ExpertPlan]) -> list[Group]:
        """Put the clients of a round into groups that train at once; the same on every rank.

        Raises:
            ValueError: the memory for a cohort cannot hold even one client.
        """
        ...

    def training(self, tasks: Sequence[Task]) -> AbstractContextManager[InTurn]:
        """Do tasks in turn within the block; each client's answer comes as soon as it is read."""
        ...

    def evaluate(self, state: ServerState) -> HeldOut:
        """Judge the global model on held-out data; every rank calls it."""
        ...
