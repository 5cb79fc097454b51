"""A run whose clients train a plain torch model."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from fedmoe_core.algorithms.base import Algorithm
from fedmoe_core.budget.limits import Cost
from fedmoe_core.client.failures import FAILURES, reason_of
from fedmoe_core.client.plain.trainer import PlainTrainer, Trained
from fedmoe_core.config.run_config import Config
from fedmoe_core.data.rows import RowData, Rows, draw_places, rows_of_steps
from fedmoe_core.messages.plan import ExpertPlan
from fedmoe_core.messages.profile import empty_profile
from fedmoe_core.messages.result import LocalFailure, LocalResult
from fedmoe_core.model.spec import ParamSpec
from fedmoe_core.privacy.chance import Secret
from fedmoe_core.server.state import Population, ServerState
from fedmoe_core.simulation.cohorts.cutting import Group, each_alone, in_cohorts
from fedmoe_core.simulation.cohorts.patience import patience
from fedmoe_core.simulation.cohorts.training import Answer, InTurn, Task, at_round
from fedmoe_core.simulation.evaluation import HeldOut
from fedmoe_core.simulation.identity import Identity
from fedmoe_core.simulation.process_group import Ranks
from fedmoe_core.simulation.worlds.federation import Holdings
from fedmoe_core.simulation.worlds.plain_costs import PlainMeter

EVAL_ROWS = 1024  # of one evaluation batch


@dataclass(frozen=True)
class PlainWorld:
    """One process's view of a run of a plain model: what ``Federation`` asks for.

    Attributes:
        config, params, population, algorithm, ranks, identity, secret: as ``Federation``.
        data: rows and who owns which.
        trainer: the live module of this process.
        meter: what clients need that train at once.
        apart: why clients train one by one though cohorts were asked for; else empty.
    """

    config: Config
    data: RowData
    trainer: PlainTrainer
    params: dict[str, Tensor]
    population: Population
    algorithm: Algorithm
    ranks: Ranks
    identity: Identity
    meter: PlainMeter
    apart: str = ""
    secret: Secret | None = None

    @cached_property
    def holdings(self) -> Holdings:
        """Return who has what."""
        names = tuple(f"client {client}" for client in range(self.config.clients))
        return Holdings(names, self.data.names_D, self.data.counts_CD, "plain", self.data.partition)

    @property
    def learning(self) -> tuple[ParamSpec, ...]:
        """Return the tensors that training moves."""
        return self.population.spec.trained(train_dense=True)

    def keeping(self, secret: Secret) -> PlainWorld:
        """Return this world with the secret of its run."""
        return replace(self, secret=secret)

    def groups(self, plans: Sequence[ExpertPlan]) -> list[Group]:
        """Put clients whose batches have the same shapes into cohorts."""
        if self.config.cohort.clients == 1 or self.apart:
            return each_alone(plans, self.apart)
        return in_cohorts(plans, self.meter, self._kind, lambda plan: "", limits=(self.config, self.ranks.device))

    @contextmanager
    def training(self, tasks: Sequence[Task]) -> Iterator[InTurn]:
        """Train one group after another.

        Nothing is drawn ahead: rows lie on the device, and a draw is a permutation of some places.
        """
        yield ((task, self._answers(task.state, task.group)) for task in tasks)

    def _answers(self, state: ServerState, group: Group) -> Iterator[Answer]:
        """Train a group; where a joint step raises, each client then trains alone, and says so."""
        if len(group.plans) == 1:
            yield self._alone(state, group.plans[0], group.alone)
            return
        began, train = time.perf_counter(), at_round(self.config.train, state.round, rounds=self.config.rounds)
        try:
            with patience(train.timeout * len(group.plans), f"a cohort of {len(group.plans)} clients"):
                found = self.trainer.train_many(
                    state.params, self._batches_of_many(group.plans), train, clients=len(group.plans)
                )
        except FAILURES as error:
            why = f"its cohort's step raised {reason_of(error)}"
            for plan in group.plans:
                yield self._alone(state, plan, why)
            return
        each = (time.perf_counter() - began) / len(group.plans)
        for plan, trained in zip(group.plans, found, strict=True):
            yield replace(
                self._answer(plan, trained, seconds=each, cohort=len(group.plans)), memory_bytes=group.predicted_bytes
            )

    def evaluate(self, state: ServerState) -> HeldOut:
        """Judge the global model on the test rows; ranks share them."""
        began, test = time.perf_counter(), self.data.test
        height = len(test[0])
        starts = list(range(0, height, EVAL_ROWS))
        mine = self.ranks.mine(starts, [float(min(EVAL_ROWS, height - start)) for start in starts])
        if mine:
            self.trainer.become(state.params)
        with self.ranks.together("evaluating"), self.trainer.judging():
            rows = [(start, tuple(tensor[start : start + EVAL_ROWS] for tensor in test)) for start in mine]
            found = [[start, *self._judge(batch)] for start, batch in rows]
        parts = sorted(part for each in self.ranks.gather(found) for part in each)
        loss = math.fsum(part[1] for part in parts) / height
        right = None if self.trainer.plain.correct_fn is None else math.fsum(part[2] for part in parts) / height
        return HeldOut(loss, right, None, None, time.perf_counter() - began)

    def _judge(self, rows: Rows) -> tuple[float, float]:
        """Sum of the losses of a batch, and how many of its predictions are right."""
        plain, model = self.trainer.plain, self.trainer.model
        loss = float(plain.loss_fn(model, rows)) * len(rows[0])
        return loss, 0.0 if plain.correct_fn is None else float(plain.correct_fn(model, rows))

    def _kind(self, plan: ExpertPlan) -> object:
        """What the clients of one cohort agree in: how many batches, and how large each is."""
        rows = len(self.data.rows_C[plan.client]) if self.config.train.local_epochs else 0
        return plan.local_steps, rows

    def _places(self, plan: ExpertPlan) -> Iterator[Tensor]:
        """Places of the rows of each of a client's batches."""
        train, key = self.config.train, (self.config.seed, plan.round, plan.client)
        return draw_places(
            self.data.rows_C[plan.client],
            key,
            steps=plan.local_steps,
            batch_size=train.batch_size,
            by_epoch=train.local_epochs > 0,
        )

    def _batches_of_many(self, plans: Sequence[ExpertPlan]) -> Iterator[Rows]:
        """Batches of many clients, step by step, each tensor (clients, rows, ...)."""
        for places in zip(*(self._places(plan) for plan in plans), strict=True):
            yield self.data.batch(torch.stack(places))

    def _alone(self, state: ServerState, plan: ExpertPlan, why: str) -> Answer:
        """Train one client by itself."""
        began, train = time.perf_counter(), at_round(self.config.train, state.round, rounds=self.config.rounds)
        batches = map(self.data.batch, self._places(plan))
        try:
            with patience(train.timeout, f"client {plan.client}"):
                trained = self.trainer.train(state.params, batches, train, seed=plan.seed)
        except FAILURES as error:
            failed = LocalFailure(replace(plan.predicted, bytes_up=0), reason_of(error))
            return Answer(replace(self.algorithm.answer(plan, failed), alone=why), plan, 0.0)
        answer = self._answer(plan, trained, seconds=time.perf_counter() - began)
        return replace(answer, update=replace(answer.update, alone=why))

    def _answer(self, plan: ExpertPlan, trained: Trained, *, seconds: float, cohort: int = 1) -> Answer:
        """Make a client's answer of what training left.

        All clients have one model and one largest batch, so their memory is that of the dry steps, measured once. A
        trace of every step (10 ms) would take longer than the step of a small model.
        """
        train = self.config.train
        rows = rows_of_steps(
            len(self.data.rows_C[plan.client]),
            plan.local_steps,
            batch_size=train.batch_size,
            by_epoch=train.local_epochs > 0,
        )
        cost = Cost(
            memory_bytes=plan.predicted.memory_bytes,
            flops=rows * self.population.costs.trunk.flops_per_token,
            bytes_down=plan.predicted.bytes_down,
            bytes_up=sum(delta.nbytes for delta in trained.deltas.values()),
            seconds=seconds,
        )
        result: LocalResult | LocalFailure
        if trained.trouble:
            result = LocalFailure(replace(cost, bytes_up=0), trained.trouble)
        else:
            result = LocalResult(trained.deltas, empty_profile(0, 0), cost, trained.losses)
        update = self.algorithm.answer(plan, result)
        return Answer(replace(update, profile=None, cohort=cohort), plan, 0.0)
