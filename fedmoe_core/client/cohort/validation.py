"""Validation of a cohort: the sub-models of several clients over the validation data of each, in joint forwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor

from fedmoe_core.client.cohort.sums import CohortSums
from fedmoe_core.client.profiling import Validation, fare
from fedmoe_core.data.batches import Batch
from fedmoe_core.layer.cohort.tape import recording_cohort
from fedmoe_core.messages.profile import ExpertFeedback
from fedmoe_core.model.cohort import LiveCohort
from fedmoe_core.model.spec import Evaluation


def validate_cohort(
    cohort: LiveCohort, batches: Sequence[Sequence[Batch]], *, log_priors: Sequence[Tensor] | None = None
) -> list[Validation | None]:
    """Run one pass of the cohort over each client's batches, as ``validate`` does for one client.

    Args:
        cohort: the live model.
        batches: of each client, of one length, as many as it has. A client with fewer than another waits, without rows.
        log_priors: what is added to each client's logits; None = nothing.

    Returns:
        What each client's pass shows, up to rounding; None for one without batches.
    """
    layers, clients = cohort.layers, range(len(batches))
    totals = [Evaluation(0.0, 0)] * len(batches)
    fare_C3LE = np.zeros((len(batches), 3, len(layers), layers[0].num_experts))
    with recording_cohort(layers) as tape:
        sums = CohortSums(layers, tape=tape)
        for now in side_by_side(batches):
            found = cohort.place_losses(now, log_priors=log_priors)
            choices = [tape.choices(number) for number in range(len(layers))]
            for client, (batch, places) in enumerate(zip(now, found, strict=True)):
                if not len(batch):
                    continue
                mine = [choices_CTK[client, : batch.tokens_SN.numel()] for choices_CTK in choices]
                fare_C3LE[client] += fare(mine, places, layers[0].num_experts)
                totals[client] += places.total
            sums.add_batch()
        return [
            Validation(totals[client], sums.finish(client), ExpertFeedback(*fare_C3LE[client]))
            if totals[client].count
            else None
            for client in clients
        ]


def side_by_side(batches: Sequence[Sequence[Batch]]) -> Iterator[list[Batch]]:
    """Return the first batch of every client, then the second, and so on; without rows where a client has no more."""
    for step in range(max(map(len, batches), default=0)):
        like = next(mine[step] for mine in batches if len(mine) > step)
        nothing = like.first(0)
        yield [mine[step] if len(mine) > step else nothing for mine in batches]
