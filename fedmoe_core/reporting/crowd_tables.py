"""The tables of a run of many clients: percentiles by tier, and by name the few that stand out."""

from __future__ import annotations

import numpy as np

from fedmoe_core.base import show
from fedmoe_core.reporting import crowd, figures
from fedmoe_core.reporting.run import Run
from fedmoe_core.reporting.tables import Cell, Piece, Table, plain
from fedmoe_core.simulation.directory.refusals import by_reason

NAMED = 10  # clients in a table of the worst
ROWS = 20  # rows of a table of what went wrong; more are counted
FIRST = 5  # names in one cell
HEADS = tuple("median" if percent == 50 else f"{percent} %" for percent in crowd.PERCENTS)


def losses(run: Run) -> Table | None:
    """Return how the losses of each tier ended: percentiles over its clients, and the worst of them by name."""
    rounds, loss_RC = crowd.loss_table(run)
    if not rounds:
        return None
    rows = []
    for group in crowd.groups(run):
        members = np.array([client for client in group.members if client < loss_RC.shape[1]], int)
        loss_M = loss_RC[-1, members]
        drawn = sum(client in run.tiers for client in group.members)
        cells = [plain(group.name), plain(str(len(group.members))), plain(str(drawn))]
        cells += [plain(show.number(value)) for value in crowd.percentiles(loss_M)]
        known = np.isfinite(loss_M)
        last = int(members[np.argmax(np.where(known, loss_M, -np.inf))]) if known.any() else None
        cells.append(plain(show.number(None if last is None else float(loss_RC[-1, last]))))
        rows.append((*cells, plain(show.NONE if last is None else run.client_name(last))))
    names = ("tier", "clients", "took part", *HEADS, "worst", "worst client")
    return Table(names, tuple(rows), left=(0, len(names) - 1))


def worst(run: Run) -> Table | None:
    """Return the clients that ended with the highest losses, by name."""
    found = crowd.worst(run, NAMED)
    if not found:
        return None
    tiers = crowd.tier_of(run)
    rounds: dict[int, int] = {}
    for record in run.clients:
        rounds[record["client"]] = rounds.get(record["client"], 0) + 1
    rows = [
        (
            plain(run.client_name(client)),
            plain(tiers[client] or show.NONE),
            plain(show.number(loss)),
            plain(show.signed(change)),
            plain(str(rounds.get(client, 0))),
        )
        for client, loss, change in found
    ]
    return Table(("client", "tier", "loss", "change", "rounds that it took part in"), tuple(rows), left=(0, 1))


def ledger(run: Run) -> Table | None:
    """Return the real cost in the last round by tier and resource: 5 %, median, 95 % and most, beside the limits."""
    if not run.ledger:
        return None
    last = max(entry["round"] for entry in run.ledger)
    lines = {entry["client"]: entry for entry in run.ledger if entry["round"] == last}
    rows, named = [], None  # a tier is named in its first row
    for group in crowd.groups(run):
        members = [lines[client] for client in group.members if client in lines]
        for key, (label, text) in figures.resources(run).items():
            real = [(entry.get("real") or {}).get(key) for entry in members]
            used = [value for value in real if value is not None]
            if not used:
                continue
            limits = [(entry.get("budget") or {}).get(key) for entry in members]
            predicted = [(entry.get("predicted") or {}).get(key) for entry in members]
            over = sum(r is not None and b is not None and r > b for r, b in zip(real, limits, strict=True))
            known = [limit for limit in limits if limit is not None]
            ends = list(dict.fromkeys(text(end) for end in (min(known), max(known)))) if known else ["no limit"]
            most, told = text(max(used)), text(max((value for value in predicted if value is not None), default=None))
            cells: list[Cell] = [plain(label), plain(str(len(used)))]
            cells += [plain(text(float(value))) for value in crowd.percentiles(used)[::2]]
            cells.append(plain(most) if told in (most, show.NONE) else (Piece(f"{most} "), Piece(f"({told})", "muted")))
            cells += [plain("–".join(ends)), (Piece(str(over), "bad"),) if over else plain("0" if known else show.NONE)]
            rows.append((plain("" if group.name == named else group.name), *cells))
            named = group.name
    names = ("tier", "resource", "clients", *HEADS[::2], "most", "limit", "over")
    return Table(names, tuple(rows), left=(0, 1)) if rows else None


def over_budget(run: Run) -> tuple[Table, str] | None:
    """Return the clients that used more than their devices can bear in any round, worst first, and what is left out."""
    resources = figures.resources(run)
    found = crowd.excesses(run, tuple(resources))
    if not found:
        return None
    tiers = crowd.tier_of(run)
    rows = []
    for excess in found[:ROWS]:
        label, text = resources[excess.resource]
        part = show.share(excess.part, 0) if show.known(excess.part) else show.NONE
        cells: list[Cell] = [
            plain(run.client_name(excess.client)),
            plain(tiers[excess.client] or show.NONE),
            plain(label),
            plain(str(excess.round)),
            (Piece(text(excess.used), "bad"),),
            plain(text(excess.limit)),
            (Piece(part, "bad"),),
            plain(str(excess.times)),
        ]
        rows.append(tuple(cells))
    names = ("client", "tier", "resource", "worst in round", "used", "limit", "of the limit", "times")
    clients = len({excess.client for excess in found})
    said = f"{show.plural(clients, 'client')} used more than the device can bear."
    if len(found) > ROWS:
        others = len({excess.client for excess in found} - {excess.client for excess in found[:ROWS]})
        said += f" The worst {ROWS} cases are shown; {show.plural(others, 'more client')} in ledger.jsonl."
    return Table(names, tuple(rows), left=(0, 1, 2)), said


def refused(run: Run) -> Table | None:
    """Return the refused updates by reason: how often, in which rounds, and the first clients by name."""
    groups = by_reason((record["round"], item) for record in run.rounds for item in record.get("refused") or ())
    rows = []
    for group in groups[:ROWS]:
        rounds = str(group.first) if group.first == group.last else f"{group.first} – {group.last}"
        names = ", ".join(run.client_name(client) for client in group.clients[:FIRST])
        if len(group.clients) > FIRST:
            names += f" and {len(group.clients) - FIRST} more"
        count = str(len(group.clients))
        rows.append((plain(str(group.times)), plain(count), plain(rounds), plain(names), plain(group.reason)))
    if left := groups[ROWS:]:
        times, clients = sum(group.times for group in left), {client for group in left for client in group.clients}
        rest = (plain(str(times)), plain(str(len(clients))), plain(""), plain(""))
        rows.append((*rest, plain(f"{show.plural(len(left), 'more reason')}, in metrics.jsonl")))
    return Table(("updates", "clients", "rounds", "whose", "reason"), tuple(rows), left=(3, 4)) if rows else None
