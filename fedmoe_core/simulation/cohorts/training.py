"""Local training of a round's groups: a cohort at once, a client alone, and alone where a cohort's step raised."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import numpy as np
from torch import Tensor

from fedmoe_core.budget.cost_model import CostModel
from fedmoe_core.client.cohort.train import Member, train_cohort
from fedmoe_core.client.failures import FAILURES, ClientTimeoutError, reason_of
from fedmoe_core.client.train import train_client
from fedmoe_core.config.run_config import TrainConfig
from fedmoe_core.data.batches import Batch
from fedmoe_core.messages.plan import Batches, ExpertPlan
from fedmoe_core.messages.result import LocalFailure, LocalResult
from fedmoe_core.messages.update import ClientUpdate, Traffic
from fedmoe_core.model.adapter import ModelAdapter
from fedmoe_core.model.cohort import CohortAdapter
from fedmoe_core.server.planning import asked_costs
from fedmoe_core.server.state import ServerState
from fedmoe_core.simulation.cohorts.cutting import Group
from fedmoe_core.simulation.cohorts.drawing import NONE_DRAWN, Drawn, round_batches
from fedmoe_core.simulation.cohorts.patience import patience
from fedmoe_core.simulation.world import World, local_settings, validation_batches


@dataclass(frozen=True)
class Answer:
    """One client's update and how it came about.

    Attributes:
        update: what its algorithm made of the result.
        plan: what it was asked.
        extract_seconds: part of its time that was not training.
        memory_bytes: the peak of its cohort, 0 where it trained alone.
        refusal: why what came could not even be read as an update; else empty.
        wire: bytes that really travelled; None where nothing did.
    """

    update: ClientUpdate
    plan: ExpertPlan
    extract_seconds: float
    memory_bytes: int = 0
    refusal: str = ""
    wire: Traffic | None = None


@dataclass(frozen=True)
class Task:
    """Clients that train at once.

    Attributes:
        state: what they start from.
        group: who they are.
        share: what their deltas count; below 1 where ``state`` is an older one.
    """

    state: ServerState
    group: Group
    share: float = 1.0


InTurn = Iterator[tuple[Task, Iterator[Answer]]]  # each task as its turn comes, with its clients' answers


def round_settings(world: World, round: int) -> TrainConfig:
    """Return local training at this round's learning rate: from lr to lr_final of it along half a cosine."""
    return at_round(local_settings(world.config, type(world.algorithm)), round, rounds=world.config.rounds)


def at_round(train: TrainConfig, round: int, *, rounds: int) -> TrainConfig:
    """Return settings at the learning rate of a round, counted from 0."""
    done = round / max(1, rounds - 1)
    factor = train.lr_final + (1 - train.lr_final) * 0.5 * (1 + math.cos(math.pi * done))
    return replace(train, lr=train.lr * factor)


def answers(world: World, state: ServerState, group: Group, drawn: Drawn = NONE_DRAWN) -> Iterator[Answer]:
    """Train a group; yield each client's answer as soon as it is read, so that no two clients' deltas are held.

    Where a cohort's joint step raises, nothing is known about its clients. Each then trains alone, and says so.
    """
    if len(group.plans) == 1:
        yield train_alone(world, state, group.plans[0], group.alone, drawn=drawn)
        return
    members = [
        Member(
            plan,
            asked_costs(world.population, plan.extras),
            partial(round_batches, world, plan, drawn),
            world.data.class_shares(plan.client),
            partial(held_out, world, plan.client),
        )
        for plan in group.plans
    ]
    train = round_settings(world, group.plans[0].round)
    try:
        with patience(train.timeout * len(members), f"a cohort of {len(members)} clients"):
            trained = train_cohort(cast(CohortAdapter, world.adapter), state.params, members, train=train)
    except FAILURES as error:
        why = f"its cohort's step raised {reason_of(error)}"
        for plan in group.plans:
            yield train_alone(world, state, plan, why, drawn=drawn)
        return
    for plan, result in zip(group.plans, trained.results, strict=True):
        update = replace(world.algorithm.answer(plan, result), cohort=len(group.plans))
        yield Answer(update, plan, result.extract_seconds, trained.memory_bytes)


def train_alone(
    world: World, state: ServerState, plan: ExpertPlan, why: str = "", *, drawn: Drawn = NONE_DRAWN
) -> Answer:
    """Train one client by itself; ``why``: as ``ClientUpdate.alone``."""
    result = local_round(
        world.adapter,
        state.params,
        plan,
        train=round_settings(world, plan.round),
        costs=asked_costs(world.population, plan.extras),
        class_shares_C=world.data.class_shares(plan.client),
        draw=partial(round_batches, world, plan, drawn),
        validation=partial(held_out, world, plan.client),
    )
    update = replace(world.algorithm.answer(plan, result), alone=why)
    return Answer(update, plan, result.extract_seconds)


def local_round(
    adapter: ModelAdapter,
    params: dict[str, Tensor],
    plan: ExpertPlan,
    *,
    train: TrainConfig,
    costs: CostModel,
    class_shares_C: np.ndarray | None,
    draw: Batches,
    validation: Batches,
) -> LocalResult | LocalFailure:
    """Train one client by itself, for ``train.timeout`` seconds at most; arguments as ``train_client``.

    ``draw`` gives its batches, from the start at every call.
    """
    try:
        with patience(train.timeout, f"client {plan.client}"):
            return train_client(
                adapter,
                params,
                plan,
                draw(),
                train=train,
                costs=costs,
                class_shares_C=class_shares_C,
                redraw=draw,
                validation=validation,
            )
    except ClientTimeoutError as error:  # before or after its training, which catches its own
        return LocalFailure(replace(plan.predicted, bytes_up=0), reason_of(error))


def held_out(world: World, client: int) -> Iterator[Batch]:
    """Return all of a client's validation batches, from the start."""
    batches = validation_batches(world.data.clients[client], world.config)
    return (batch.to(world.ranks.device) for batch in batches)
