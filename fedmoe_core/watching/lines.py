"""The lines of a run's logs as far as a watcher needs them; anything else on a line is passed over unread."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, TypeVar

import msgspec

from fedmoe_core.simulation.directory.run_schema import Amount, Count, Number
from fedmoe_core.watching.tail import Tail

T = TypeVar("T")
Each = list[Number | None]


@dataclass(frozen=True)
class MetricsLine:
    """One line of metrics.jsonl, of a round or of a client."""

    type: str
    round: Count
    loss: Number | None = None
    accuracy: Number | None = None
    loss_clients: Each | None = None
    personal_loss_C: Each | None = None
    bytes_down_total: Amount | None = None
    bytes_up_total: Amount | None = None
    virtual_seconds_total: Amount | None = None
    seconds: Amount | None = None
    coverage: Number | None = None
    client: Count = 0
    status: str = ""
    error: str = ""

    @property
    def losses(self) -> list[float | None]:
        """Every client's loss under the global model, or under its own where there is no global one."""
        return self.loss_clients or self.personal_loss_C or []


@dataclass(frozen=True)
class LedgerLine:
    """One line of ledger.jsonl: what a client could bear and what it used, by resource."""

    client: Count
    budget: dict[str, Amount | None]
    real: dict[str, Annotated[float, msgspec.Meta(ge=0)] | None]


METRICS = msgspec.json.Decoder(MetricsLine)
LEDGER = msgspec.json.Decoder(LedgerLine)


def new_lines(tail: Tail, decoder: msgspec.json.Decoder[T]) -> Iterator[T | None]:
    """Read on; None for a line that no run writes."""
    for line in tail.lines():
        try:
            yield decoder.decode(line)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            yield None
