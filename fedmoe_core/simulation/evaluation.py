"""How good the global model is, for all clients together and for each, and how good each client's own model is."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

from torch import Tensor

from fedmoe_core.base.ahead import ahead
from fedmoe_core.client.cohort.validation import side_by_side
from fedmoe_core.client.step import log_prior
from fedmoe_core.data.batches import Batch, Encoded, eval_batches, eval_sequences
from fedmoe_core.messages.plan import ExpertPlan
from fedmoe_core.model.adapter import Evaluation, ModelAdapter
from fedmoe_core.model.cohort import CohortAdapter
from fedmoe_core.server.state import ServerState
from fedmoe_core.simulation.cohorts.grouping import judged_together
from fedmoe_core.simulation.world import World

# Rows or windows of one evaluation batch; no gradient is kept, so it may be larger than a client's.
EVAL_BATCH = 32


@dataclass(frozen=True)
class HeldOut:
    """Held-out results of the global model, and of every client's own where they were asked for.

    Attributes:
        loss: mean over clients of their own loss (language modelling), or over the global test split, in nats; None
            where the algorithm has no global model.
        accuracy: share of the global test split that is right; None where the task has no classes, or as ``loss``.
        loss_C, accuracy_C: the same on each client's own held-out data.
        personal_loss_C, personal_accuracy_C: of each client's own deployable model on its own held-out data. Where
            training adjusted the logits by the client's log class shares, its own model still does: that is the
            predictor that was trained; without them it would predict as if all classes were equally frequent.
        seconds: wall-clock.
    """

    loss: float | None
    accuracy: float | None
    loss_C: tuple[float, ...] | None
    accuracy_C: tuple[float, ...] | None
    seconds: float
    personal_loss_C: tuple[float, ...] | None = None
    personal_accuracy_C: tuple[float, ...] | None = None


def evaluate_clients(world: World, state: ServerState) -> HeldOut:
    """Evaluate on held-out data; ranks share the clients and gather the results.

    The global model on every client's data, unless the algorithm has none; each client's own (``personal``) where the
    configuration asks for it or there is nothing else to judge.
    """
    began = time.perf_counter()
    held = HeldOut(None, None, None, None, 0.0)
    if world.algorithm.has_global_model:
        held = evaluate_global(world, state)
    if world.config.eval.personal or not world.algorithm.has_global_model:
        loss_C, accuracy_C = _evaluate_personal(world, state)
        held = replace(held, personal_loss_C=loss_C, personal_accuracy_C=accuracy_C)
    return replace(held, seconds=time.perf_counter() - began)


def evaluate_global(world: World, state: ServerState) -> HeldOut:
    """Judge the global model on every client's held-out data, and on the global test split where there is one."""
    data, clients = world.data, len(world.data.clients)
    world.adapter.configure(state.params)
    parts = [client.test for client in data.clients] + ([] if data.test is None else [data.test])
    limits = [world.config.eval.sequences] * clients + [0] * (len(parts) - clients)
    losses, shares = _evaluate_parts(world, parts, limits)
    labeled = data.test is not None
    return HeldOut(
        loss=losses[clients] if labeled else math.fsum(losses) / clients,
        accuracy=shares[clients] if labeled else None,
        loss_C=tuple(losses[:clients]),
        accuracy_C=tuple(shares[:clients]) if labeled else None,
        seconds=0.0,
    )


def evaluate_public(world: World, state: ServerState) -> HeldOut:
    """Judge the global model by text of the server alone: its test split, or its public text where it has none.

    As many sequences as a simulation judges for all its clients; of the clients themselves nothing is known.
    """
    began, data, config = time.perf_counter(), world.data, world.config
    world.adapter.configure(state.params)
    part = data.public if data.test is None else data.test
    limit = config.eval.sequences * config.clients if data.test is None else 0
    losses, shares = _evaluate_parts(world, [part], [limit])
    accuracy = None if data.test is None else shares[0]
    return HeldOut(losses[0], accuracy, None, None, time.perf_counter() - began)


def _evaluate_personal(world: World, state: ServerState) -> tuple[tuple[float, ...], tuple[float, ...] | None]:
    """Loss and, where there are classes, accuracy of every client's own model, in cohorts where the run has them.

    Who is in which cohort depends on nothing but the plans and the configuration, and so do the bits.
    """
    clients, seq_len, sequences = world.data.clients, world.config.train.seq_len, world.config.eval.sequences
    plan_of: Callable[[int], ExpertPlan] = partial(world.algorithm.personal, state)
    groups, found = [[client] for client in range(len(clients))], dict[str, list[float]]()
    sizes = [float(eval_sequences(client.test, seq_len, sequences=sequences)) for client in clients]
    with world.ranks.together("evaluating"):
        if world.cohorts is not None:  # else each is planned by the rank that judges it
            plans = [plan_of(client) for client in range(len(clients))]
            groups = [[plan.client for plan in part] for part in judged_together(world, world.cohorts, plans)]
            plan_of = plans.__getitem__
        for group in world.ranks.mine(groups, [sum(sizes[client] for client in group) for group in groups]):
            results = own_models(world, state, [plan_of(client) for client in group])
            for client, result in zip(group, results, strict=True):
                found[str(client)] = [result.loss_sum, result.count, result.correct]
    losses, shares = _means(world, found)
    return tuple(losses), None if world.data.test is None else tuple(shares)


def own_models(world: World, state: ServerState, plans: Sequence[ExpertPlan]) -> list[Evaluation]:
    """Judge clients' own models on their own held-out data, all at once where there are several.

    In batches of the training shape then, so that a cohort needs no more memory than one that trains.
    """
    train, device = world.config.train, world.ranks.device
    submodels = [plan.submodel(train_dense=False) for plan in plans]
    found = [log_prior(world.data.class_shares(plan.client), train, device) for plan in plans]
    batches = [
        eval_batches(
            world.data.clients[plan.client].test,
            batch_size=EVAL_BATCH if len(plans) == 1 else train.batch_size,
            seq_len=train.seq_len,
            sequences=world.config.eval.sequences,
        )
        for plan in plans
    ]
    if len(plans) == 1:
        world.adapter.configure(state.params, submodels[0])
        return [evaluate(world.adapter, (batch.to(device) for batch in batches[0]), log_prior_C=found[0])]
    cohort = cast(CohortAdapter, world.adapter).become_cohort(
        state.params, submodels, tokens=train.batch_size * train.seq_len, joined=lambda client: None
    )
    priors, totals = [prior for prior in found if prior is not None], [Evaluation(0.0, 0)] * len(plans)
    for now in side_by_side([list(mine) for mine in batches]):
        places = cohort.place_losses([batch.to(device) for batch in now], log_priors=priors or None)
        totals = [
            total + each.total if len(batch) else total for total, each, batch in zip(totals, places, now, strict=True)
        ]
    return totals


def _evaluate_parts(world: World, parts: Sequence[Encoded], limits: Sequence[int]) -> tuple[list[float], list[float]]:
    """Mean loss and share of correct predictions of the live model on each part; small parts are judged together."""
    device, seq_len, found = world.ranks.device, world.config.train.seq_len, dict[str, list[float]]()
    sizes = [eval_sequences(part, seq_len, sequences=limit) for part, limit in zip(parts, limits, strict=True)]
    together = hasattr(world.adapter, "evaluate_parts")
    packs = packed(sizes, EVAL_BATCH) if together else [[index] for index in range(len(parts))]

    def drawn(index: int) -> Iterator[Batch]:
        return eval_batches(parts[index], batch_size=EVAL_BATCH, seq_len=seq_len, sequences=limits[index])

    def joined(pack: list[int]) -> Batch | None:
        """All sequences of several parts; those of one part, which may be many, are drawn as they are judged."""
        return None if len(pack) == 1 else Batch.end_to_end([next(drawn(index)) for index in pack]).staged(device)

    mine = world.ranks.mine(packs, [float(sum(sizes[index] for index in pack)) for pack in packs])
    with world.ranks.together("evaluating"), ahead(mine, joined) as ready:
        for pack, whole in ready:
            if whole is None:
                results = [evaluate(world.adapter, (batch.to(device) for batch in drawn(pack[0])))]
            else:
                results = cast(CohortAdapter, world.adapter).evaluate_parts(
                    whole.to(device, non_blocking=True), [sizes[index] for index in pack]
                )
            for index, result in zip(pack, results, strict=True):
                found[str(index)] = [result.loss_sum, result.count, result.correct]
    return _means(world, found)


def _means(world: World, found: dict[str, list[float]]) -> tuple[list[float], list[float]]:
    """Mean loss and share of correct predictions by index, of what all ranks have found: sums of loss, count, right."""
    merged = {int(index): value for part in world.ranks.gather(found) for index, value in part.items()}
    sums = [merged[index] for index in range(len(merged))]
    return [loss / max(count, 1) for loss, count, _ in sums], [right / max(count, 1) for _, count, right in sums]


def packed(sizes: Sequence[int], most: int) -> list[list[int]]:
    """Put neighbours together until they hold ``most`` sequences; a larger one stays by itself.

    Example:
        >>> packed([3, 4, 1, 9, 2], 8)
        [[0, 1, 2], [3], [4]]
    """
    packs: list[list[int]] = []
    room = 0
    for index, size in enumerate(sizes):
        if size > room:
            packs.append([])
            room = most
        packs[-1].append(index)
        room -= size
    return packs


def evaluate(adapter: ModelAdapter, batches: Iterable[Batch], *, log_prior_C: Tensor | None = None) -> Evaluation:
    """Sum over batches with the live model as it is configured; ``log_prior_C`` is added to the logits of classes."""
    total = Evaluation(0.0, 0)
    for batch in batches:
        total += adapter.evaluate(batch, log_prior_C=log_prior_C)
    return total
