"""How good the global model is, for all clients together and for each, and how good each client's own model is."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import cast

from torch import Tensor

from fedmoe_core.client.step import log_prior
from fedmoe_core.data.batches import Batch, Encoded, eval_batches, eval_sequences
from fedmoe_core.model.adapter import Evaluation, ModelAdapter
from fedmoe_core.model.cohort import CohortAdapter
from fedmoe_core.server.state import ServerState
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
        held = _evaluate_global(world, state)
    if world.config.eval.personal or not world.algorithm.has_global_model:
        loss_C, accuracy_C = _evaluate_personal(world, state)
        held = replace(held, personal_loss_C=loss_C, personal_accuracy_C=accuracy_C)
    return replace(held, seconds=time.perf_counter() - began)


def _evaluate_global(world: World, state: ServerState) -> HeldOut:
    data, clients = world.data, len(world.data.clients)
    world.adapter.configure(state.params)
    parts = [client.test for client in data.clients] + ([] if data.test is None else [data.test])
    limits = [world.config.eval.sequences] * clients + [0] * (len(parts) - clients)
    losses, shares = _evaluate_parts(world, parts, limits, None)
    labeled = data.test is not None
    return HeldOut(
        loss=losses[clients] if labeled else math.fsum(losses) / clients,
        accuracy=shares[clients] if labeled else None,
        loss_C=tuple(losses[:clients]),
        accuracy_C=tuple(shares[:clients]) if labeled else None,
        seconds=0.0,
    )


def _evaluate_personal(world: World, state: ServerState) -> tuple[tuple[float, ...], tuple[float, ...] | None]:
    """Loss and, where there are classes, accuracy of every client's own model."""
    train, device = world.config.train, world.ranks.device

    def become(client: int) -> Tensor | None:
        plan = world.algorithm.personal(state, client)
        world.adapter.configure(state.params, plan.submodel(train_dense=False))
        return log_prior(world.data.class_shares(client), train, device)

    parts = [client.test for client in world.data.clients]
    losses, shares = _evaluate_parts(world, parts, [world.config.eval.sequences] * len(parts), become)
    return tuple(losses), None if world.data.test is None else tuple(shares)


def _evaluate_parts(
    world: World, parts: Sequence[Encoded], limits: Sequence[int], become: Callable[[int], Tensor | None] | None
) -> tuple[list[float], list[float]]:
    """Mean loss and share of correct predictions on each part, after the live model became what belongs to it.

    ``become`` returns what is added to the logits of that part, if anything. None: one model for all, which judges
    small parts together.
    """
    device, seq_len, found = world.ranks.device, world.config.train.seq_len, {}
    sizes = [eval_sequences(part, seq_len, sequences=limit) for part, limit in zip(parts, limits, strict=True)]
    together = become is None and hasattr(world.adapter, "evaluate_parts")
    packs = packed(sizes, EVAL_BATCH) if together else [[index] for index in range(len(parts))]
    with world.ranks.together("evaluating"):
        for pack in world.ranks.mine(packs, [float(sum(sizes[index] for index in pack)) for pack in packs]):
            drawn = [
                eval_batches(parts[index], batch_size=EVAL_BATCH, seq_len=seq_len, sequences=limits[index])
                for index in pack
            ]
            if len(pack) == 1:
                prior_C = None if become is None else become(pack[0])
                results = [evaluate(world.adapter, (batch.to(device) for batch in drawn[0]), log_prior_C=prior_C)]
            else:
                whole = Batch.end_to_end([next(batches) for batches in drawn]).to(device)
                results = cast(CohortAdapter, world.adapter).evaluate_parts(whole, [sizes[index] for index in pack])
            for index, result in zip(pack, results, strict=True):
                found[str(index)] = [result.loss_sum, result.count, result.correct]
    merged = {int(index): value for part in world.ranks.gather(found) for index, value in part.items()}
    counts = [max(merged[index][1], 1) for index in range(len(parts))]
    losses = [merged[index][0] / count for index, count in enumerate(counts)]
    return losses, [merged[index][2] / count for index, count in enumerate(counts)]


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
