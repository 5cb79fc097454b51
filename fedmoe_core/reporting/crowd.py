"""Runs of many clients: who is shown together by tier, percentiles of what they came to, the few worst by name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedmoe_core.base import show
from fedmoe_core.reporting.run import Run

PERCENTS = (5, 25, 50, 75, 95)
MOST_GROUPS = 9  # a budget for each client would make as many tiers as clients; nine panels are three rows of three


@dataclass(frozen=True)
class Group:
    """Clients that are shown together, ascending: those of one tier, or of all tiers that are too many to show."""

    name: str
    members: tuple[int, ...]


@dataclass(frozen=True)
class Excess:
    """What one client used more of than its device can bear, in the round in which that was worst.

    Attributes:
        client, round: whose and when.
        resource: a field of ``Cost``.
        used, limit: amounts; ``used`` is None where it was not a number.
        times: rounds in which the client passed this limit.
    """

    client: int
    round: int
    resource: str
    used: float | None
    limit: float
    times: int

    @property
    def part(self) -> float:
        """Used as a part of the limit; infinite where that cannot be said."""
        return self.used / self.limit if self.used is not None and self.limit else math.inf


def clients_of(run: Run) -> list[int]:
    """Return every client that the run knows of: those in its records, its partition and its evaluations."""
    judged = max((len(losses(record)) for record in run.rounds), default=0)
    return sorted({*run.client_ids, *range(judged), *(line["client"] for line in run.ledger)})


def crowded(run: Run) -> bool:
    """Tell whether a run has too many clients to show one by one."""
    return len(clients_of(run)) > show.MANY


def tier_of(run: Run) -> dict[int, str]:
    """Return the tier of every client; one that was never drawn has what the configuration deals: budgets in turn."""
    budgets = [str(budget).strip() for budget in run.config.get("budgets") or ()] or [""]
    return {client: run.tiers.get(client, budgets[client % len(budgets)]) for client in clients_of(run)}


def groups(run: Run) -> list[Group]:
    """Group the clients of a run by tier, in the order of the tiers' first clients, which is the configuration's.

    Of more than ``MOST_GROUPS`` tiers those with the most clients are shown, and the others as one group at the end.
    """
    members: dict[str, list[int]] = {}
    for client, tier in tier_of(run).items():
        members.setdefault(tier, []).append(client)
    shown = set(members)
    if len(members) > MOST_GROUPS:
        shown = set(sorted(members, key=lambda tier: -len(members[tier]))[: MOST_GROUPS - 1])
    found = [Group(tier or show.NONE, tuple(members[tier])) for tier in members if tier in shown]
    if others := [tier for tier in members if tier not in shown]:
        rest = sorted(client for tier in others for client in members[tier])
        found.append(Group(f"{len(others)} other tiers", tuple(rest)))
    return found


def losses(record: Mapping[str, Any]) -> Sequence[float | None]:
    """Return every client's loss under the global model, or under its own where there is no global one."""
    return record.get("loss_clients") or record.get("personal_loss_C") or ()


def loss_table(run: Run) -> tuple[list[int], np.ndarray]:
    """Return the rounds in which clients were judged, and their losses as (R, C), NaN where one was not."""
    judged = [record for record in run.rounds if any(map(show.known, losses(record)))]
    return [record["round"] for record in judged], np.array([losses(record) for record in judged], float)


def percentiles(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return ``PERCENTS`` of the finite values, (5,); NaN without any."""
    found = np.asarray(values, float)
    found = found[np.isfinite(found)]
    return np.percentile(found, PERCENTS) if found.size else np.full(len(PERCENTS), np.nan)


def worst(run: Run, count: int) -> list[tuple[int, float, float | None]]:
    """Return the clients that ended with the highest loss, worst first: client, loss, change since first judged."""
    _, loss_RC = loss_table(run)
    if not loss_RC.size:
        return []
    last_C = np.where(np.isfinite(loss_RC[-1]), loss_RC[-1], -np.inf)
    order = [int(client) for client in np.argsort(-last_C, kind="stable")[:count] if np.isfinite(last_C[client])]
    changes = [float(last_C[client] - loss_RC[0, client]) for client in order]
    return [
        (client, float(last_C[client]), change if show.known(change) else None)
        for client, change in zip(order, changes, strict=True)
    ]


def excesses(run: Run, resources: Sequence[str]) -> list[Excess]:
    """Return where clients used more than their devices can bear, one entry a client and resource, worst first."""
    found: dict[tuple[int, str], Excess] = {}
    for line in run.ledger:
        real, limits = line.get("real") or {}, line.get("budget") or {}
        for key in resources:
            used, limit = real.get(key, 0), limits.get(key)
            if limit is None or (used is not None and used <= limit):
                continue
            before = found.get((line["client"], key))
            now = Excess(line["client"], line["round"], key, used, limit, 1 if before is None else before.times + 1)
            if before is not None and before.part >= now.part:
                now = replace(before, times=now.times)
            found[line["client"], key] = now
    return sorted(found.values(), key=lambda excess: (-excess.part, excess.client))
