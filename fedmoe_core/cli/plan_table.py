"""The table of a dry run, as text."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rich.table import Table
from rich.text import Text

from fedmoe_core.base import show
from fedmoe_core.base.wording import visible
from fedmoe_core.budget.limits import RESOURCES
from fedmoe_core.config.run_config import Config
from fedmoe_core.simulation.observer import PlanRow

HEADS: Mapping[str, str] = {"memory": "peak memory", "down": "down", "up": "up", "flops": "FLOPs"}
TEXTS: Mapping[str, Callable[[float | None], str]] = {"flops": show.flops, "energy": show.joules}  # others in bytes


def plan_table(rows: list[PlanRow], config: Config) -> Table:
    """Lay out a dry run, one row a client: what it would hold, and what each resource needs beside its limit."""
    title = visible(f"{config.algorithm}: {config.model} on {config.data}, first round")
    table = Table(title=Text(title, style="table.title"), title_justify="left")
    # Experts have columns of their own, and what is counted for some devices only is shown where one limits it.
    words = [word for word in RESOURCES if word != "experts" and (word in HEADS or any(_limited(rows, word)))]
    for name in ("client", "tier"):
        table.add_column(name, no_wrap=True)
    for name in ("experts", "trained", *(HEADS.get(word, word) for word in words), "steps", "k", "samples"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("fits")
    for row in rows:
        held = f"{'+'.join(map(str, row.experts_held))} = {row.experts}"
        table.add_row(
            Text(visible(row.client)),  # a Text, because rich reads "[red]" in a plain name as an order
            Text(visible(row.tier)),
            held if len(row.experts_held) <= 4 else str(row.experts),
            str(row.trainable),
            *(_against(row, word) for word in words),
            str(row.local_steps),
            str(row.top_k),
            str(row.samples),
            "yes" if row.fits else "[red]no[/red]",
        )
    return table


def _limited(rows: list[PlanRow], word: str) -> list[bool]:
    """Tell of every row whether its device limits a resource."""
    return [row.budget.limit(word) is not None for row in rows]


def _against(row: PlanRow, word: str) -> str:
    """What a resource's use is, beside its limit if there is one."""
    used, limit = RESOURCES[word].used(row.predicted, row.budget), row.budget.limit(word)
    text = TEXTS.get(word, show.size)
    if limit is None:
        return text(used)
    color = "red" if used > limit else "green"
    return f"[{color}]{text(used)}[/{color}] / {text(limit)}"
