"""The server's view of clients whose text it never sees: as long as theirs, and empty of content."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from fedmoe_core.data.batches import Encoded
from fedmoe_core.data.federated import ClientData, FederatedData
from fedmoe_core.messages.wire.greeting import Description


def with_stand_ins(data: FederatedData, described: Mapping[int, Description]) -> FederatedData:
    """Put stand-ins where the clients are, so that costs, weights and budgets come out as they would for their text.

    Args:
        data: the server's own corpus; of its clients nothing is kept.
        described: what each client told of itself, by client from 0.

    Raises:
        ValueError: a client counts something else than this task's classes, or has no data.
    """
    tolds = [described[client] for client in range(len(described))]
    width, labeled = len(data.names_D), data.task == "classification"
    for told in tolds:
        samples = told.rows if labeled else told.tokens
        if samples < 1:
            raise ValueError(f"client {told.client} ({told.name}) has no data; give it some, or set clients")
        if labeled and (len(told.counts) != width or sum(told.counts) != told.rows):
            raise ValueError(
                f"client {told.client} ({told.name}) counts {sum(told.counts)} rows in {len(told.counts)} classes, and "
                f"has {told.rows} rows of {width} classes; mend its labels"
            )
    counts_CD = [told.counts if len(told.counts) == width else [0] * width for told in tolds]
    return replace(
        data,
        clients=tuple(_stand_in(told, data.public.end, labeled=labeled) for told in tolds),
        counts_CD=np.array(counts_CD, dtype=np.int64),
    )


def _stand_in(told: Description, end: int, *, labeled: bool) -> ClientData:
    held_back = told.validation_tokens > 0
    return ClientData(
        told.name,
        _as_long(told.tokens, told.rows, end, labeled=labeled),
        _as_long(0, 0, end, labeled=labeled),
        _as_long(told.validation_tokens, told.validation_rows, end, labeled=labeled) if held_back else None,
    )


def _as_long(tokens: int, rows: int, end: int, *, labeled: bool) -> Encoded:
    """Text of so many tokens and rows that takes no memory."""
    labels_P = torch.zeros(1, dtype=torch.int64).expand(rows) if labeled else None
    return Encoded(
        torch.full((1,), end, dtype=torch.int32).expand(tokens),
        torch.zeros(1, dtype=torch.int64).expand(rows + 1),
        end,
        labels_P,
    )
