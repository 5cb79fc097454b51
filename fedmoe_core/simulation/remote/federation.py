"""A run whose clients are real devices: plans go out as bytes, and nothing that comes back is believed.

Rounds, log, checkpoint and resume are those of every run.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from fedmoe_core.algorithms.base import Algorithm
from fedmoe_core.budget.limits import NOTHING
from fedmoe_core.config.run_config import Config, is_plain
from fedmoe_core.messages.plan import ExpertPlan
from fedmoe_core.messages.result import LocalFailure, LocalResult
from fedmoe_core.messages.update import Traffic
from fedmoe_core.messages.wire.answer import read_answer
from fedmoe_core.messages.wire.envelope import WireError
from fedmoe_core.messages.wire.greeting import Description, Greeting
from fedmoe_core.messages.wire.task import Setting, cannot_travel, task_bytes
from fedmoe_core.model.spec import ParamSpec, model_hash
from fedmoe_core.privacy.chance import Secret
from fedmoe_core.server.planning import asked_costs
from fedmoe_core.server.schema import blank, malformed
from fedmoe_core.server.state import Population, ServerState
from fedmoe_core.simulation.cohorts.cutting import Group, each_alone
from fedmoe_core.simulation.cohorts.training import Answer, InTurn, Task
from fedmoe_core.simulation.evaluation import HeldOut, evaluate_public
from fedmoe_core.simulation.identity import Identity
from fedmoe_core.simulation.observer import Observer
from fedmoe_core.simulation.prepare import found_world, read_sources, refuse_early, warm_model
from fedmoe_core.simulation.process_group import Ranks
from fedmoe_core.simulation.remote.exchange import Exchange, FailedReply, Roll
from fedmoe_core.simulation.remote.node import BASE_UNKNOWN, TRUNK_UNKNOWN
from fedmoe_core.simulation.remote.own_data import vocabulary_of
from fedmoe_core.simulation.remote.stand_in import with_stand_ins
from fedmoe_core.simulation.worlds.federation import Federation, Holdings
from fedmoe_core.simulation.worlds.moe import MoEWorld

# An answer may be this many times as large as what was sent without the trunk: changes of half-precision weights may
# come in float32, and a router in both forms.
ANSWER_FACTOR, ANSWER_MORE = 4, 4 << 20
GREETING_SHARE = 0.25  # of a round's time: for devices that have come since


@dataclass(frozen=True)
class RemoteFederation:
    """The server of a deployment: what ``Federation`` asks for.

    Attributes:
        world: model, population and system as in a simulation; its clients' text is a stand-in.
        roll: which client is where.
        setting: what all tasks have in common.
    """

    world: MoEWorld
    roll: Roll
    setting: Setting

    @property
    def config(self) -> Config:
        """Return the resolved configuration."""
        return self.world.config

    @property
    def params(self) -> dict[str, Tensor]:
        """Return the model that federation starts from."""
        return self.world.params

    @property
    def population(self) -> Population:
        """Return what the clients told of themselves."""
        return self.world.population

    @property
    def algorithm(self) -> Algorithm:
        """Return the system that plans, weighs and averages."""
        return self.world.algorithm

    @property
    def ranks(self) -> Ranks:
        """Return this process, which has no peers."""
        return self.world.ranks

    @property
    def identity(self) -> Identity:
        """Return the digests of data, model and code."""
        return self.world.identity

    @property
    def holdings(self) -> Holdings:
        """Return who has what."""
        return self.world.holdings

    @property
    def learning(self) -> tuple[ParamSpec, ...]:
        """Return the tensors that may train in this run."""
        return self.world.learning

    @property
    def secret(self) -> Secret | None:
        """Return from what a private run draws its noise; no message holds any of it."""
        return self.world.secret

    def keeping(self, secret: Secret) -> RemoteFederation:
        """Return the same with the secret of its run."""
        return replace(self, world=self.world.keeping(secret))

    def groups(self, plans: Sequence[ExpertPlan]) -> list[Group]:
        """Put every client into a group of its own.

        Raises:
            ValueError: a plan asks for what cannot travel.
        """
        for plan in plans:
            if what := cannot_travel(plan, self.algorithm.wishes):
                raise ValueError(
                    f"algorithm={self.config.algorithm!r} asks its clients for {what}, and only data can travel; "
                    "declare it in the system's wishes as a frozen dataclass of numbers, texts, tuples and arrays"
                )
        return each_alone(plans)

    @contextmanager
    def training(self, tasks: Sequence[Task]) -> Iterator[InTurn]:
        """Send all tasks at once; each answer comes as soon as it is there, and after ``train.timeout`` none does."""
        yield self._answers(tasks)

    def evaluate(self, state: ServerState) -> HeldOut:
        """Judge the global model by the server's own text."""
        return evaluate_public(self.world, state)

    def _answers(self, tasks: Sequence[Task]) -> InTurn:
        seconds, began, sizes = self.config.train.timeout, time.monotonic(), dict[int, int]()
        self.roll.look_again(seconds * GREETING_SHARE)
        waiting = {self.roll.address[c]: task for task in tasks if (c := _client(task)) in self.roll.address}
        away = [task for task in tasks if _client(task) not in self.roll.address]

        def messages() -> Iterator[tuple[int, bytes]]:
            for address, task in list(waiting.items()):
                message = self._message(task)
                sizes[address] = len(message)
                yield address, message

        left = max(0.0, began + seconds - time.monotonic())
        for address, reply in self.roll.exchange.send("train", messages(), left):
            if (task := waiting.pop(address, None)) is not None:
                yield task, iter([self._answer(task.group.plans[0], sizes.get(address, 0), reply)])
        for late in waiting.values():
            yield late, iter([self._failed(late.group.plans[0], f"did not answer within {seconds:g} s")])
        for task in away:
            yield task, iter([self._failed(task.group.plans[0], "is not connected")])

    def _message(self, task: Task) -> bytes:
        """The task of one client, with the trunk where this client does not have it."""
        plan = task.group.plans[0]
        trunk = self._trunk_of("router" in plan.extras.keeps, plan)
        lacks = bool(trunk) and trunk not in self.roll.trunks.get(plan.client, set())
        return task_bytes(
            self.setting,
            plan,
            task.state.params,
            costs=asked_costs(self.population, plan.extras),
            with_trunk=lacks,
            trunk=trunk,
            base=self.roll.bases.asked(self.setting.spec, plan, task.state.params),
        )

    def _trunk_of(self, with_router: bool, plan: ExpertPlan) -> str:
        """The digest of what never trains, which is the same in every round."""
        if with_router not in self._trunks:
            tensors = self.setting.trunk(self.params, plan)
            self._trunks[with_router] = model_hash(tensors) if tensors else ""
        return self._trunks[with_router]

    @cached_property
    def _trunks(self) -> dict[bool, str]:
        return {}

    def _answer(self, plan: ExpertPlan, down: int, reply: bytes | FailedReply) -> Answer:
        """What came back from one client, under its algorithm's weights; or why it cannot be read."""
        if isinstance(reply, FailedReply):
            return self._failed(plan, str(reply), Traffic(down, 0))
        wire = Traffic(down, len(reply) if isinstance(reply, bytes) else 0)
        try:
            largest = ANSWER_FACTOR * self._size(plan) + ANSWER_MORE
            result = read_answer(reply, plan, self.setting.session, largest=largest)
            if isinstance(result, LocalFailure):
                self._heard(plan, result.error)
                return self._failed(plan, result.error, wire, result)
            with np.errstate(all="ignore"):  # statistics may be NaN until admission has looked
                update = self.algorithm.answer(plan, self._here(result))
        except WireError as error:
            return Answer(blank(plan, str(error)), plan, 0.0, refusal=str(error), wire=wire)
        except Exception as error:  # whatever a hostile result makes an algorithm raise
            return Answer(blank(plan, ""), plan, 0.0, refusal=malformed(error), wire=wire)
        self._heard(plan, "")
        return Answer(update, plan, 0.0, wire=wire)

    def _size(self, plan: ExpertPlan) -> int:
        """Bytes of all that a client of this plan may have trained, and of its statistics."""
        rows = {param.key: int(plan.permitted_LE[param.layer].sum()) for param in self.learning if param.layer >= 0}
        each = {p.key: p.dtype.itemsize * _product(p.shape[1:]) for p in self.learning if p.layer >= 0}
        whole = sum(p.dtype.itemsize * _product(p.shape) for p in self.learning if p.layer < 0)
        return whole + sum(rows[key] * each[key] for key in rows) + 400 * plan.permitted_LE.size

    def _heard(self, plan: ExpertPlan, error: str) -> None:
        """Remember whether a client has the trunk, and the base of its experts."""
        if not error or error.startswith((BASE_UNKNOWN, TRUNK_UNKNOWN)):  # without its trunk, its disk is new
            self.roll.bases.heard(plan, lost=bool(error))
        known = self.roll.trunks.setdefault(plan.client, set())
        if error.startswith(TRUNK_UNKNOWN):
            known.clear()
        elif not error or error.startswith(BASE_UNKNOWN):
            known.add(self._trunk_of("router" in plan.extras.keeps, plan))

    def _here(self, result: LocalResult) -> LocalResult:
        """The result on this process's device."""
        device = self.ranks.device
        deltas, kept = ({key: t.to(device) for key, t in part.items()} for part in (result.deltas, result.kept))
        return replace(result, deltas=deltas, kept=kept)

    def _failed(
        self, plan: ExpertPlan, why: str, wire: Traffic | None = None, failure: LocalFailure | None = None
    ) -> Answer:
        told = LocalFailure(NOTHING, why) if failure is None else failure
        return Answer(self.algorithm.answer(plan, told), plan, 0.0, wire=wire)


def _client(task: Task) -> int:
    return task.group.plans[0].client


def _product(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())


def found_remote(exchange: Exchange, *, wait: float) -> Callable[[Config, Ranks, Observer], Federation]:
    """Return what founds a run over real devices.

    Args:
        exchange: how they are reached.
        wait: seconds until every client must have come.
    """

    def found(config: Config, ranks: Ranks, observer: Observer) -> RemoteFederation:
        refuse_simulated(config)
        config = _with_secret(config)
        torch.set_num_threads(config.threads)
        sources = read_sources(config, ranks, observer)
        vocabulary = vocabulary_of(sources.data)
        session, code = secrets.token_hex(16), sources.identity.code
        told = replace(config, out="runs/device", cache="").to_toml()
        roll = Roll(exchange, Greeting(session, told, code, vocabulary), config.clients)
        observer.on_stage(f"waiting for {config.clients} clients, {wait:g} s at most")
        roll.gather(wait)
        config = _with_budgets(config, roll.described)
        sources = replace(sources, config=config, data=with_stand_ins(sources.data, roll.described))
        params = warm_model(sources, observer, train=True, before_training=partial(refuse_early, sources))
        observer.on_stage("measuring one local step and the value of experts on public text")
        world = found_world(sources, params)
        learning = frozenset(param.key for param in world.learning)
        setting = Setting(session, told, vocabulary.digest, world.adapter.spec, learning)
        return RemoteFederation(world, roll, setting)

    return found


def _with_budgets(config: Config, described: Mapping[int, Description]) -> Config:
    """Each client's own limits where it stated some, one tier for each client then."""
    if not any(told.budget for told in described.values()):
        return config
    tiers = config.budgets
    return replace(config, budgets=tuple(described[c].budget or tiers[c % len(tiers)] for c in range(config.clients)))


def _with_secret(config: Config) -> Config:
    """A private run draws by a secret here: every device is told the seed."""
    return replace(config, privacy=replace(config.privacy, secret=config.privacy.clip > 0))


def refuse_simulated(config: Config) -> None:
    """Refuse what only a simulation can do.

    Raises:
        ValueError: one sentence with the remedy.
    """
    if not config.train.timeout:
        raise ValueError("train.timeout=0 would wait for a lost device forever; set it to the seconds of a round")
    for name, value, usual in (
        ("ranks", config.ranks, 1),
        ("cohort.clients", config.cohort.clients, 1),
        ("time.mode", config.time.mode, "rounds"),
        ("time.straggle", config.time.straggle, 0.0),
        ("eval.personal", config.eval.personal, False),
        ("lora.frozen_format", config.lora.frozen_format, "none"),
    ):
        if value != usual:
            raise ValueError(f"{name}={value} is for simulations; real devices need {name}={usual}")
    if config.privacy.secure:
        raise ValueError(
            "privacy.secure=true is for simulations: its masks and keys follow from the seed of the run, which every "
            "device knows; set privacy.secure=false"
        )
    if config.privacy.drop:
        raise ValueError(f"privacy.drop={config.privacy.drop:g} is for simulations: real devices drop out; set it to 0")
    if is_plain(config.adapter):
        raise ValueError(
            f"adapter={config.adapter} is a plain model, whose data lie in the simulator; use transformers"
        )
