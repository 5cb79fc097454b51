"""A run whose clients fine-tune a language model with MoE layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

from fedmoe_core.base.ahead import ahead
from fedmoe_core.messages.plan import ExpertPlan
from fedmoe_core.model.spec import ParamSpec
from fedmoe_core.privacy.chance import Secret
from fedmoe_core.server.state import ServerState
from fedmoe_core.simulation.cohorts.cutting import Group
from fedmoe_core.simulation.cohorts.drawing import draw
from fedmoe_core.simulation.cohorts.grouping import grouped
from fedmoe_core.simulation.cohorts.training import InTurn, Task, answers
from fedmoe_core.simulation.evaluation import HeldOut, evaluate_clients
from fedmoe_core.simulation.world import World, local_settings
from fedmoe_core.simulation.worlds.federation import Holdings


@dataclass(frozen=True)
class MoEWorld(World):
    """A ``World`` that trains and judges its clients: what ``Federation`` asks for."""

    @cached_property
    def holdings(self) -> Holdings:
        """Return who has what."""
        data = self.data
        names = tuple(client.name for client in data.clients)
        return Holdings(names, tuple(data.names_D), data.counts_CD, data.task, data.partition)

    @property
    def learning(self) -> tuple[ParamSpec, ...]:
        """Return experts and routers, and of the dense tensors all or the head."""
        train = local_settings(self.config, type(self.algorithm))
        return self.adapter.spec.trained(train_dense=train.trunk == "fedavg")

    def keeping(self, secret: Secret) -> MoEWorld:
        """Return this world with the secret of its run."""
        return replace(self, secret=secret)

    def groups(self, plans: Sequence[ExpertPlan]) -> list[Group]:
        """Put clients of one kind into cohorts."""
        return grouped(self, plans)

    @contextmanager
    def training(self, tasks: Sequence[Task]) -> Iterator[InTurn]:
        """Train one group after another; while one does, the batches of the next are drawn."""
        with ahead(tasks, lambda task: draw(self, task.group)) as ready:
            yield ((task, answers(self, task.state, task.group, drawn)) for task, drawn in ready)

    def evaluate(self, state: ServerState) -> HeldOut:
        """Judge the global model, and each client's own where that was asked for."""
        return evaluate_clients(self, state)
