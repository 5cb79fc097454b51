"""The table of a dry run, as text."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from fedmoe_core.base import show
from fedmoe_core.base.wording import visible
from fedmoe_core.config.run_config import Config
from fedmoe_core.simulation.observer import PlanRow


def _plan_table(rows: list[PlanRow], config: Config) -> Table:
    title = visible(f"{config.algorithm}: {config.model} on {config.data}, first round")
    table = Table(title=Text(title, style="table.title"), title_justify="left")
    for name in ("client", "tier"):
        table.add_column(name, no_wrap=True)
    for name in ("experts", "trained", "peak memory", "FLOPs", "down", "up", "steps", "k", "samples"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("fits")

    def against(cost: float, limit: float | None, text: Any) -> str:
        if limit is None:
            return str(text(cost))
        color = "red" if cost > limit else "green"
        return f"[{color}]{text(cost)}[/{color}] / {text(limit)}"

    for row in rows:
        table.add_row(
            Text(visible(row.client)),  # a Text, because rich reads "[red]" in a plain name as an order
            Text(visible(row.tier)),
            f"{'+'.join(map(str, row.experts_held))} = {row.experts}"
            if len(row.experts_held) <= 4
            else str(row.experts),
            str(row.trainable),
            against(row.memory_bytes, row.memory_budget, show.size),
            against(row.flops, row.flops_budget, show.flops),
            against(row.bytes_down, row.bytes_down_budget, show.size),
            against(row.bytes_up, row.bytes_up_budget, show.size),
            str(row.local_steps),
            str(row.top_k),
            str(row.samples),
            "yes" if row.fits else "[red]no[/red]",
        )
    return table
