"""The tables of a dry run, as text: what each client would hold and spend, and who would train at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from rich.table import Table
from rich.text import Text

from fedmoe_core.base import show
from fedmoe_core.base.wording import visible
from fedmoe_core.budget.resources import RESOURCES
from fedmoe_core.config.run_config import Config
from fedmoe_core.simulation.observer import GroupRow, PlanRow

HEADS: Mapping[str, str] = {"memory": "peak memory", "down": "down", "up": "up", "flops": "FLOPs"}
TEXTS: Mapping[str, Callable[[float | None], str]] = {
    "flops": show.flops,
    "energy": show.joules,
    "time": show.seconds,
}  # others in bytes
SPLIT = 240  # columns of a screen that has room for what a client's time is made of


SHOWN = 10  # clients that cannot run and are named under the tiers


def plan_table(rows: list[PlanRow], config: Config, *, every: bool = False, width: int = 0) -> Table:
    """Lay out a dry run, one row a client: what it would hold, and what each resource needs beside its limit.

    Energy and time are there where some tier says what they are counted by; from ``SPLIT`` columns of ``width`` on,
    each client's time is split into down + compute + up.

    More than ``show.MANY`` clients are one row a tier, with the least and the most of its clients, and below them the
    first ``SHOWN`` clients that cannot run; ``every`` client has its row if asked for. Tiers past ``show.MANY`` are one
    row.
    """
    many = len(rows) > show.MANY and not every
    plain = not any(row.experts_held for row in rows)  # a plain torch model: no experts, and no k
    what = config.adapter if plain else f"{config.model} on {config.data}"
    title = visible(f"{config.algorithm}: {what}, first round")
    table = Table(title=Text(title, style="table.title"), title_justify="left")
    # Experts have columns of their own, and what is counted for some devices only is shown where one counts it.
    words = [w for w, row in RESOURCES.items() if w != "experts" and any(row.known(plan.budget) for plan in rows)]
    split = width >= SPLIT and not many
    for name in ("clients" if many else "client", "tier"):
        table.add_column(name, no_wrap=True)
    heads = ["experts", "trained", *(HEADS.get(word, word) for word in words), "steps", "k", "samples"]
    if split and "time" in heads:
        heads.insert(heads.index("time") + 1, "= down + compute + up")
    places = [place for place, head in enumerate(heads) if not (plain and head in ("experts", "trained", "k"))]
    for place in places:
        table.add_column(heads[place], justify="right", no_wrap=True)
    table.add_column("fits")
    shown = rows
    if many:
        tiers: dict[str, list[PlanRow]] = {}
        for row in rows:
            tiers.setdefault(row.tier, []).append(row)
        if len(tiers) > show.MANY:
            kept = dict(list(tiers.items())[: show.MANY - 1])
            rest = [row for tier, members in tiers.items() if tier not in kept for row in members]
            tiers = {**kept, f"{len(tiers) - len(kept)} other tiers": rest}
        for tier, members in tiers.items():
            *cells, fits = _of_tier(members, words)
            table.add_row(str(len(members)), Text(visible(tier)), *(cells[place] for place in places), fits)
        table.add_section()
        outside = [row for row in rows if not row.fits]
        shown = outside[:SHOWN]
        left = f"; {len(outside) - SHOWN} more do not fit" if len(outside) > SHOWN else ""
        table.caption = f"least–most of each tier{left}; --all shows every client, --json all numbers"
    for row in shown:
        held = f"{'+'.join(map(str, row.experts_held))} = {row.experts}"
        cells = [
            held if len(row.experts_held) <= 4 else str(row.experts),
            str(row.trainable),
            *(cell for word in words for cell in _cells(row, word, split=split)),
            str(row.local_steps),
            str(row.top_k),
            str(row.samples),
        ]
        table.add_row(
            Text(visible(row.client)),  # a Text, because rich reads "[red]" in a plain name as an order
            Text(visible(row.tier)),
            *(cells[place] for place in places),
            "[red]no[/red]" if not row.fits else "[yellow]late[/yellow]" if row.late else "yes",
        )
    return table


def groups_table(groups: Sequence[GroupRow], *, every: bool = False) -> Table:
    """Lay out the groups of the first round, a row each: how many clients, who, the predicted peak, and why alone.

    More than ``show.MANY`` groups are one row for each size and reason, unless ``every`` one is asked for.
    """
    cohorts, alone = [group for group in groups if not group.alone], sum(bool(group.alone) for group in groups)
    title = f"first round: {show.plural(len(cohorts), 'cohort')}, {show.plural(alone, 'client')} alone"
    table = Table(title=Text(title, style="table.title"), title_justify="left")
    many = len(groups) > show.MANY and not every
    table.add_column("groups" if many else "group", justify="right", no_wrap=True)
    table.add_column("clients", justify="right", no_wrap=True)
    table.add_column("peak memory", justify="right", no_wrap=True)
    table.add_column("alone because" if many else "who, and why alone")
    if not many:
        for number, group in enumerate(groups, 1):
            who = ", ".join(group.clients) + (f": {group.alone}" if group.alone else "")
            table.add_row(str(number), str(len(group.clients)), show.size(group.predicted_bytes), Text(visible(who)))
        return table
    kinds: dict[tuple[int, str], list[float]] = {}
    for group in groups:
        kinds.setdefault((len(group.clients), group.alone), []).append(group.predicted_bytes)
    for (size, why), peaks in sorted(kinds.items(), reverse=True):
        table.add_row(str(len(peaks)), str(size), _range(peaks, show.size), Text(visible(why)))
    return table


def _of_tier(rows: list[PlanRow], words: list[str]) -> list[str]:
    """Return the cells of a tier after its name: the least and the most of its clients, and how many cannot run."""
    outside, late = sum(not row.fits for row in rows), sum(row.late for row in rows)
    return [
        _range([row.experts for row in rows]),
        _range([row.trainable for row in rows]),
        *(_against_all(rows, word) for word in words),
        _range([row.local_steps for row in rows]),
        _range([row.top_k for row in rows]),
        _range([row.samples for row in rows]),
        f"[red]{outside} do not[/red]" if outside else f"[yellow]{late} late[/yellow]" if late else "yes",
    ]


def _range(values: list[float] | list[int], text: Callable[[float], str] = str) -> str:
    """Least and most, or one where both read the same."""
    return "–".join(dict.fromkeys((text(min(values)), text(max(values)))))


def _against_all(rows: list[PlanRow], word: str) -> str:
    """What the clients of a tier use of a resource, beside their limits if there are any."""
    text = TEXTS.get(word, show.size)
    known = [RESOURCES[word].used(row.predicted, row.budget) for row in rows if RESOURCES[word].known(row.budget)]
    used = _range(known, text) if known else show.NONE
    limits = [limit for row in rows if (limit := row.budget.limit(word)) is not None]
    if not limits:
        return used
    over = any(
        (limit := row.budget.limit(word)) is not None and RESOURCES[word].used(row.predicted, row.budget) > limit
        for row in rows
    )
    return f"[{'red' if over else 'green'}]{used}[/] / {_range(limits, text)}"


def _cells(row: PlanRow, word: str, *, split: bool) -> list[str]:
    """Return the cell of a resource, and behind that of time its parts if they are shown."""
    if word != "time" or not split:
        return [_against(row, word)]
    return [_against(row, word), "" if row.seconds is None else " + ".join(f"{part:.1f}" for part in row.seconds)]


def _against(row: PlanRow, word: str) -> str:
    """What a resource's use is, beside its limit if there is one."""
    if not RESOURCES[word].known(row.budget):
        return show.NONE
    used, limit = RESOURCES[word].used(row.predicted, row.budget), row.budget.limit(word)
    text = TEXTS.get(word, show.size)
    if limit is None:
        return text(used)
    color = "red" if used > limit else "green"
    return f"[{color}]{text(used)}[/{color}] / {text(limit)}"
