"""The refused updates of a run, grouped by reason."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_NUMBER = re.compile(r"\d+(?:\.\d+)*(?:[eE][+-]?\d+)?")


@dataclass(frozen=True)
class Refusals:
    """Updates that were refused for one reason.

    Attributes:
        reason: in the server's words; numbers in which the updates differ are ``#``.
        times: how many updates.
        clients: whose, each once, in the order of their first refusal.
        first, last: the rounds between which they were refused.
    """

    reason: str
    times: int
    clients: tuple[int, ...]
    first: int
    last: int


def by_reason(items: Iterable[tuple[int, Mapping[str, Any]]]) -> list[Refusals]:
    """Group refused updates by reason, the most frequent first.

    Reasons that differ only in their numbers, such as the step at which a loss became NaN, are one.

    Args:
        items: for each update the round and its entry under ``refused`` in that round's record, in order of rounds.
    """
    found: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    for number, item in items:
        found.setdefault(_NUMBER.sub("#", item["reason"]), []).append((number, item))
    groups = [
        Refusals(
            reason=words.pop() if len(words := {item["reason"] for _, item in refused}) == 1 else same,
            times=len(refused),
            clients=tuple(dict.fromkeys(item["client"] for _, item in refused)),
            first=min(number for number, _ in refused),
            last=max(number for number, _ in refused),
        )
        for same, refused in found.items()
    ]
    return sorted(groups, key=lambda group: -group.times)
