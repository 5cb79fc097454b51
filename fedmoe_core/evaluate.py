"""How good the global model is, for everybody and for each client."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedmoe_core.adapter import Evaluation, ModelAdapter
from fedmoe_core.batch import Batch, eval_batches
from fedmoe_core.config import Config
from fedmoe_core.data import ClientData
from fedmoe_core.state import ServerState

if TYPE_CHECKING:
    from fedmoe_core.prepare import World

# Rows or windows of one evaluation batch; no gradient is kept, so it may be larger than a client's.
EVAL_BATCH = 32


@dataclass(frozen=True)
class Held:
    """Held-out results of the global model.

    Attributes:
        loss: mean over clients of their own loss (language modelling), or over the global test split, in nats.
        accuracy: share of the global test split that is right; None where the task has no classes.
        loss_C, accuracy_C: the same on each client's own held-out data.
        seconds: wall-clock.
    """

    loss: float
    accuracy: float | None
    loss_C: tuple[float, ...]
    accuracy_C: tuple[float, ...] | None
    seconds: float


def evaluate_clients(world: World, state: ServerState) -> Held:
    """Evaluate the global model on every client's held-out data; ranks share the clients and gather the results."""
    began = time.perf_counter()
    config, data, adapter = world.config, world.data, world.adapter
    adapter.configure(state.params)
    parts = [client.test for client in data.clients] + ([] if data.test is None else [data.test])
    limits = [config.eval.sequences] * len(data.clients) + [0]
    mine = world.ranks.mine(range(len(parts)), [float(len(part)) for part in parts])
    found = {}
    for index in mine:
        batches = eval_batches(
            parts[index], batch_size=EVAL_BATCH, seq_len=config.train.seq_len, sequences=limits[index]
        )
        result = evaluate(adapter, (batch.to(world.ranks.device) for batch in batches))
        found[str(index)] = [result.loss_sum, result.count, result.correct]
    merged = {int(index): value for part in world.ranks.gather(found) for index, value in part.items()}
    losses = [merged[index][0] / max(merged[index][1], 1) for index in range(len(parts))]
    shares = [merged[index][2] / max(merged[index][1], 1) for index in range(len(parts))]
    clients = len(data.clients)
    labelled = data.test is not None
    return Held(
        loss=losses[clients] if labelled else math.fsum(losses) / clients,
        accuracy=shares[clients] if labelled else None,
        loss_C=tuple(losses[:clients]),
        accuracy_C=tuple(shares[:clients]) if labelled else None,
        seconds=time.perf_counter() - began,
    )


def validation_batches(client: ClientData, config: Config) -> Iterator[Batch]:
    """All of a client's validation data, in batches of the training shape; none where it has no such data.

    Of the training shape, so that the pass needs no more memory than a local step.
    """
    if client.validation is not None:
        yield from eval_batches(
            client.validation,
            batch_size=config.train.batch_size,
            seq_len=config.train.seq_len,
            sequences=config.eval.validation,
        )


def evaluate(adapter: ModelAdapter, batches: Iterable[Batch]) -> Evaluation:
    """Sums over batches of the live model as it is configured."""
    loss_sum, count, correct = 0.0, 0, 0
    for batch in batches:
        result = adapter.evaluate(batch)
        loss_sum, count, correct = loss_sum + result.loss_sum, count + result.count, correct + result.correct
    return Evaluation(loss_sum, count, correct)
