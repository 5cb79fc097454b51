"""The tables of the report as plain values: texts, each with the class that the page gives it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedmoe_core.base import show
from fedmoe_core.reporting import crowd, figures
from fedmoe_core.reporting.results import by_quality, held, quality_of, remarks
from fedmoe_core.reporting.run import Run


@dataclass(frozen=True)
class Piece:
    """A text and its CSS class (or colour, in the key of a figure); an empty class is plain text."""

    text: str
    kind: str = ""


Cell = tuple[Piece, ...]


@dataclass(frozen=True)
class Table:
    """A table; the columns in ``left`` hold words and align left."""

    names: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    left: tuple[int, ...]


def plain(text: str) -> Cell:
    """Make a cell of one plain text."""
    return (Piece(text),)


def exceeded(run: Run, unbound: Piece) -> Cell:
    """Make a cell of how often budgets were broken, good only at 0; ``unbound`` where none bound the run."""
    if run.broken or run.budgeted:
        return (Piece(str(run.broken), "bad" if run.broken else "good"),)
    return (unbound,)


def runs_table(runs: Sequence[Run]) -> Table:
    """Return one row a run, sorted by how it ended, with what sets it apart from the first under its name."""
    timed = figures.timed(runs)
    accurate, quality = any(run.has_accuracy for run in runs), quality_of(runs)
    seeds = len({run.seed for run in runs}) > 1
    rows = []
    for run in by_quality(runs):
        s, apart = run.summary, "; ".join(remarks(run, runs[0]))
        texts = [str(run.seed)] if seeds else []
        texts += [show.change(s, "accuracy", show.share)] if accurate else []
        texts += [quality.text(quality.of(run))] if quality.personal else []
        texts += [show.change(s, "loss", show.number), show.number(s.get("worst_client_loss")), show.size(run.traffic)]
        texts += [show.flops(s.get("flops")), show.size(s.get("peak_memory_bytes")), held(run).replace("..", "–")]
        texts += [show.seconds(run.virtual_seconds)] if timed else []
        name = (Piece(run.name), Piece(apart, "label")) if apart else plain(run.name)
        broken = exceeded(run, Piece(show.NONE))
        rows.append((name, *map(plain, texts), broken, plain(show.seconds(s.get("seconds")))))
    names = ["run", *(["seed"] if seeds else []), *(["accuracy"] if accurate else [])]
    names += ["clients' own models"] if quality.personal else []
    names += ["held-out loss", "worst client", "moved", "computed", "peak memory", "experts held"]
    names += ["virtual time"] if timed else []
    return Table((*names, "budgets exceeded", "time"), tuple(rows), left=(0,))


def tiers(run: Run) -> Table | None:
    """Return one row a tier: its clients, what they held and used at most, and where their loss ended.

    In a run of many clients those count too that took no part, and tiers that are too many are one row.
    """
    if not run.tiers:
        return None
    tiers: Mapping[int, str] = {client: run.tiers[client] for client in run.client_ids if client in run.tiers}
    if crowd.crowded(run):
        tiers = {client: group.name for group in crowd.groups(run) for client in group.members}
    key = "loss_clients" if run.last("loss_clients") else "personal_loss_C"
    final, first = run.last(key) or [], run.last(key, first=True) or []
    own = run.last("personal_accuracy_C") or []
    members_of: dict[str, list[int]] = {}
    for client, name in tiers.items():
        members_of.setdefault(name, []).append(client)
    lines_of: dict[str, list[Mapping[str, Any]]] = {}
    for entry in run.ledger:
        if (tier_of := tiers.get(entry["client"])) is not None:
            lines_of.setdefault(tier_of, []).append(entry)
    resources = figures.resources(run)
    rows = []
    for tier, members in members_of.items():
        lines = lines_of.get(tier, [])
        cells = [plain(tier or show.NONE), plain(str(len(members)))]
        for key, (_, text) in resources.items():
            used = [value for entry in lines if (value := (entry.get("real") or {}).get(key)) is not None]
            pairs = [((entry.get("real") or {}).get(key), (entry.get("budget") or {}).get(key)) for entry in lines]
            parts = [real / limit for real, limit in pairs if real is not None and limit]
            shown = Piece(text(max(used)) if used else show.NONE)
            mark = "bad" if parts and max(parts) > 1 else "muted"
            bound = (Piece(" "), Piece(show.share(max(parts), 0), mark)) if parts else ()
            cells.append((shown, *bound))
        end = [final[c] for c in members if c < len(final) and show.known(final[c])]
        start = [first[c] for c in members if c < len(first) and show.known(first[c])]
        mean = float(np.mean(end)) if end else None
        change = None if mean is None or not start else mean - float(np.mean(start))
        cells += map(plain, (show.number(mean), show.signed(change), show.number(max(end, default=None))))
        right = [own[c] for c in members if c < len(own) and show.known(own[c])]
        if right:
            cells.append(plain(f"{show.share(float(np.mean(right)))}, {show.share(min(right))}"))
        elif own:
            cells.append(plain(show.NONE))
        rows.append(tuple(cells))
    names = ["tier", "clients", *(label for label, _ in resources.values())]
    names += ["mean loss", "change", "worst", *(["own accuracy: mean, worst"] if own else [])]
    return Table(tuple(names), tuple(rows), left=(0,))


def ledger(run: Run) -> Table | None:
    """Return predicted and real cost of every client in the last round."""
    if not run.ledger:
        return None
    last, resources = max(entry["round"] for entry in run.ledger), figures.resources(run)
    rows = []
    for entry in (e for e in run.ledger if e["round"] == last):
        real, predicted, limit = (entry.get(part) or {} for part in ("real", "predicted", "budget"))
        cells = [plain(run.client_name(entry["client"]))]
        for key, (_, text) in resources.items():
            value, bound = real.get(key), limit.get(key)
            over = value is not None and bound is not None and value > bound
            shown = show.NONE if value is None else text(value)
            cell = [Piece(shown, "bad" if over else "")]
            if predicted.get(key) is not None and text(predicted[key]) != shown:
                cell += [Piece(" "), Piece(f"({text(predicted[key])})", "muted")]
            cells.append((*cell, Piece(f" over {text(bound)}", "bad")) if over else tuple(cell))
        rows.append((*cells, plain(show.seconds(real.get("seconds")))))
    names = ("client", *(label for label, _ in resources.values()), "time")
    return Table(names, tuple(rows), left=(0,))


def late(run: Run) -> Table | None:
    """Return one row a client whose updates came after the deadline: how many, and the least and most it took."""
    took: dict[int, list[float]] = {}
    for _, client, seconds in run.late:
        took.setdefault(client, []).append(seconds)
    rows = [
        (plain(run.client_name(client)), *map(plain, (str(len(each)), *map(show.seconds, (min(each), max(each))))))
        for client, each in sorted(took.items(), key=lambda item: (-len(item[1]), item[0]))[: show.MANY]
    ]
    return Table(("client", "too late", "least time", "most time"), tuple(rows), left=(0,)) if rows else None


def guarded(run: Run) -> Table | None:
    """Return one row a client whose changes the guard of the sums scaled down or left out, the most left out first."""
    counts: dict[int, Counter[str]] = {}
    for record in run.rounds:
        for name in ("left_out", "bounded"):
            for client, parts in ((record.get("guard") or {}).get(name) or {}).items():
                counts.setdefault(int(client), Counter())[name] += parts
    order = sorted(counts.items(), key=lambda item: (-item[1]["left_out"], -item[1]["bounded"], item[0]))[: show.MANY]
    rows = [(plain(run.client_name(c)), plain(str(n["left_out"])), plain(str(n["bounded"]))) for c, n in order]
    return Table(("client", "parts left out", "parts scaled down"), tuple(rows), left=(0,)) if rows else None


def refused(run: Run) -> Table | None:
    """Return one row for each update that the server refused."""
    items = [(r["round"], item) for r in run.rounds for item in r.get("refused") or ()]
    rows = [
        (plain(str(number)), plain(run.client_name(item["client"])), plain(item["reason"])) for number, item in items
    ]
    return Table(("round", "client", "reason"), tuple(rows), left=(0, 1, 2)) if rows else None
