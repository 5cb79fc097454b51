"""The figures of a report, each a function from runs to a matplotlib figure, or None where nothing was recorded."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedmoe_core.base import show
from fedmoe_core.reporting import crowd
from fedmoe_core.reporting.drawing import (
    against_limit,
    bands,
    cells,
    client_ticks,
    expert_ticks,
    label_ends,
    tier_lines,
)
from fedmoe_core.reporting.run import Run
from fedmoe_core.reporting.theme import BLUE, BLUES, EMPTY, HELD, INK, ORANGE, PALE, PALETTE

WIDTH = 10.4  # inches; the page is 75 characters of text wide and the figures fill it
RESOURCES: dict[str, tuple[str, Callable[[float | None], str]]] = {
    "memory_bytes": ("peak memory", show.size),
    "flops": ("FLOPs", show.flops),
    "bytes_down": ("bytes down", show.size),
    "bytes_up": ("bytes up", show.size),
    "experts": ("experts", lambda count: show.NONE if count is None else f"{count:.0f}"),
    "energy_joules": ("energy", show.joules),
    "virtual_seconds": ("virtual time", show.seconds),
}
COUNTED = ("energy_joules", "virtual_seconds")  # by what some devices alone say of themselves


def resources(run: Run) -> dict[str, tuple[str, Callable[[float | None], str]]]:
    """Return what a run's tables show of its resources: what some device counts, and experts where there are any."""
    counted = {key for key in COUNTED if any((entry.get("real") or {}).get(key) for entry in run.ledger)}
    shown = dict.fromkeys(COUNTED, False) | dict.fromkeys(counted, True) | {"experts": not run.plain}
    return {key: words for key, words in RESOURCES.items() if shown.get(key, True)}


def learning(runs: Sequence[Run]) -> Figure | None:
    """Draw held-out loss, and accuracy if there is one, against rounds, bytes, FLOPs and time; one line per run.

    Of the global model where some run has one, and of the clients' own models, on average, where those were evaluated.
    """
    every = [record for run in runs for record in run.rounds]
    metrics = [
        (value, label, scale)
        for value, label, scale in (
            (_value("loss"), "held-out loss (nats)", 1.0),
            (_value("accuracy"), "held-out accuracy (%)", 100.0),
            (_mean("personal_loss_C"), "clients' own models: mean loss (nats)", 1.0),
            (_mean("personal_accuracy_C"), "clients' own models: mean accuracy (%)", 100.0),
        )
        if any(show.known(value(record)) for record in every)
    ]
    if not metrics:
        return None
    axes_of: list[tuple[str, Callable[[Mapping[str, Any]], float | None], float]] = [
        ("rounds", lambda r: r["round"], 1.0),
        *_scaled(
            "moved, both ways", runs, lambda r: _plus(r.get("bytes_down_total"), r.get("bytes_up_total")), 1024, "B"
        ),
        *_scaled("computed by clients", runs, lambda r: r.get("flops_total"), 1000, "FLOP"),
        *([("virtual hours", _value("virtual_seconds_total"), 3600.0)] if timed(runs) else []),
    ]
    figure = Figure(figsize=(WIDTH, 2.9 * len(metrics)))
    grid = figure.subplots(len(metrics), len(axes_of), sharey="row", squeeze=False)
    for row, (metric, label, scale) in zip(grid, metrics, strict=True):
        for axes, (name, place, unit) in zip(row, axes_of, strict=True):
            ends: list[tuple[float, float, str, str]] = []
            for run, color in zip(runs, _colors(runs), strict=True):
                found = [(place(r), metric(r)) for r in run.rounds]
                points = [(x / unit, y * scale) for x, y in found if show.known(x) and show.known(y)]  # type: ignore[operator]
                if not points:
                    continue
                x, y = zip(*points, strict=True)
                axes.plot(x, y, color=color, lw=2, marker="o", ms=3.2, mec="white", mew=0.6)
                ends.append((x[-1], y[-1], run.name, color))
            axes.set_xlabel(name)
            axes.margins(x=0.04, y=0.12)
            if name == "rounds":
                axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            if axes is row[-1] and len(runs) > 1:
                label_ends(axes, ends)
        row[0].set_title(label)
    figure.tight_layout(w_pad=2.0, h_pad=1.6)
    return figure


def timed(runs: Sequence[Run]) -> bool:
    """Tell whether some of these runs have a virtual clock."""
    return any(run.virtual_seconds is not None for run in runs)


def spread(runs: Sequence[Run]) -> Figure | None:
    """Draw every client's held-out loss per round, with the worst, the mean and the best named; one panel a run.

    Many clients are drawn as the bands in which 90 % and 50 % of them lie. The losses are those of the global model, or
    of each client's own where there is no global one.
    """
    tables = [crowd.loss_table(run) for run in runs]
    if not any(rounds for rounds, _ in tables):
        return None
    columns = min(len(runs), 3)
    rows = -(-len(runs) // columns)
    figure = Figure(figsize=(WIDTH, 3.0 * rows))
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    for axes in grid[len(runs) :]:
        axes.set_visible(False)
    for axes, run, (x, loss_RC) in zip(grid, runs, tables, strict=False):
        if not x:
            axes.set_visible(False)
            continue
        if crowd.crowded(run):
            most_R, mean_R, least_R = bands(axes, x, loss_RC)
        else:
            axes.plot(x, loss_RC, color="#c3ccd4", lw=0.8)
            most_R, mean_R, least_R = np.nanmax(loss_RC, 1), np.nanmean(loss_RC, 1), np.nanmin(loss_RC, 1)
        worst, best = np.nanargmax(loss_RC[-1]), np.nanargmin(loss_RC[-1])
        lines = (
            (most_R, ORANGE, f"worst: {run.client_name(int(worst))}"),
            (mean_R, INK, "mean"),
            (least_R, PALETTE[2], f"best: {run.client_name(int(best))}"),
        )
        for y, color, _ in lines:
            axes.plot(x, y, color=color, lw=2)
        label_ends(axes, [(x[-1], y[-1], text, color) for y, color, text in lines])
        axes.set_title(run.name if len(runs) > 1 else "held-out loss of each client (nats)")
        axes.set_xlabel("rounds")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    figure.tight_layout(w_pad=2.0)
    return figure


def holdings(run: Run) -> Figure | None:
    """Show which client holds and trains which expert, for the first, middle and last round and up to four layers."""
    by_round: dict[int, dict[int, Mapping[str, Any]]] = {}
    for record in run.clients:
        if record.get("held_LE"):
            by_round.setdefault(record["round"], {})[record["client"]] = record
    if not by_round:
        return None
    numbers = sorted(by_round)
    shown = list(dict.fromkeys([numbers[0], numbers[(len(numbers) - 1) // 2], numbers[-1]]))
    layers, experts = np.shape(next(iter(by_round[numbers[0]].values()))["held_LE"])
    chosen = sorted({round(place) for place in np.linspace(0, layers - 1, min(layers, 4))})
    order = run.client_ids
    height = min(max(0.17 * len(order), 1.1), 3.6)
    figure = Figure(figsize=(WIDTH, (height + 0.42) * len(chosen) + 0.4))
    grid = figure.subplots(len(chosen), len(shown), sharex=True, sharey=True, squeeze=False)
    for row, layer in zip(grid, chosen, strict=True):
        for axes, number in zip(row, shown, strict=True):
            state_CE = np.full((len(order), experts), np.nan)
            for place, client in enumerate(order):
                if entry := by_round[number].get(client):
                    held_E, trained_E = np.array(entry["held_LE"][layer]), np.array(entry["trained_LE"][layer])
                    state_CE[place] = held_E + (held_E * trained_E)
            cells(axes, state_CE, cmap=HELD, vmin=0, vmax=2)
            tier_lines(axes, run, order)
            axes.set_title(f"layer {layer}, round {number}")
        client_ticks(row[0], run, order)
    for axes in grid[-1]:
        expert_ticks(axes, experts)
        axes.set_xlabel("expert")
    figure.tight_layout(w_pad=1.2, h_pad=1.0)
    return figure


def importance(run: Run) -> Figure | None:
    """Draw every expert's importance by layer (mean over the fleet), and how many clients hold the expert."""
    values = run.last("importance_LE")
    if values is None:
        return None
    value_LE = np.array([[np.nan if v is None else v for v in row] for row in values], float)
    last = max((r["round"] for r in run.clients), default=0)
    held = [np.array(r["held_LE"]) for r in run.clients if r["round"] == last and r.get("held_LE")]
    layers, experts = value_LE.shape
    height = min(max(0.24 * layers, 0.5), 4.0)
    panels = [("importance, mean over the fleet, as a share of its layer", _shares(value_LE), "{:.0%}")]
    if held:
        panels.append(
            (f"clients that hold it, of {len(held)} in round {last}", np.sum(held, 0).astype(float), "{:.0f}")
        )
    figure = Figure(figsize=(WIDTH, (height + 0.5) * len(panels) + 0.3))
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (title, table_LE, form) in zip(grid, panels, strict=True):
        top = np.nanmax(table_LE) if np.isfinite(table_LE).any() else 1.0
        cells(axes, table_LE, cmap=BLUES, vmin=0, vmax=top or 1.0)
        axes.set_title(title)
        axes.set_yticks(range(layers) if layers <= 12 else range(0, layers, -(-layers // 8)))
        axes.set_ylabel("layer")
        if experts <= 24 and layers <= 12:
            for (layer, expert), value in np.ndenumerate(table_LE):
                color = "white" if value > 0.5 * top else INK
                text = form.format(value).replace("%", "") if np.isfinite(value) else ""
                axes.text(expert, layer, text, ha="center", va="center", fontsize=7, color=color)
    panels_unit = " (%)" if experts <= 24 and layers <= 12 else ""
    grid[0].set_title(panels[0][0] + panels_unit)
    expert_ticks(grid[-1], experts)
    grid[-1].set_xlabel("expert")
    figure.tight_layout(h_pad=1.0)
    return figure


def budgets(run: Run) -> Figure | None:
    """Draw the largest share of every limit that each client used in any round, against the hard line at 100 %."""
    order = run.client_ids
    panels: list[tuple[str, list[tuple[float, float] | None]]] = []
    for key, (label, _) in RESOURCES.items():
        shares = largest_shares(run, key)
        used = [shares.get(client) for client in order]
        if any(used):
            panels.append((label, used))
    if not panels:
        return None
    few = len(order) <= 30
    figure = Figure(figsize=(WIDTH, min(max(0.23 * len(order), 1.0), 5.5) + 0.8))
    grid = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    thick = 0.74 if few else 1.0  # gaps between thin bars would only flicker
    most = max(100 * max(pair) for _, used in panels for pair in used if pair)
    for axes, (label, used) in zip(grid, panels, strict=True):
        for place, pair in enumerate(used):
            if pair is None:
                if few:
                    axes.text(3, place, "no limit", va="center", fontsize=7.5, color="#98a3ad")
                continue
            real, predicted = 100 * pair[0], 100 * pair[1]
            over = real > 100
            axes.barh(place, 100, height=thick, color=EMPTY)
            axes.barh(place, real, height=thick, color=ORANGE if over else BLUE, hatch="//" if over else None)
            axes.plot([predicted] * 2, [place - thick / 2, place + thick / 2], color=PALETTE[5], lw=2)
            if few:
                axes.text(max(real - 3, 14), place, f"{real:.0f}", ha="right", va="center", fontsize=7.5, color="white")
        tier_lines(axes, run, order)
        against_limit(axes, label, most)
    client_ticks(grid[0], run, order)
    grid[0].set_ylim(len(order) - 0.4, -0.6)
    grid[len(grid) // 2].set_xlabel("% of the limit")
    figure.tight_layout(w_pad=1.5)
    return figure


def data_split(run: Run) -> Figure | None:
    """Show which client holds what data: each client's rows by label or domain, as a share of its own."""
    if not run.partition or not run.partition.get("counts"):
        return None
    count_CD = np.array(run.partition["counts"], float)
    order = [client for client in run.client_ids if client < len(count_CD)]
    count_CD = count_CD[order]
    total_C = count_CD.sum(1, keepdims=True)
    share_CD = np.divide(count_CD, total_C, out=np.zeros_like(count_CD), where=total_C > 0)
    names = [str(name) for name in run.partition.get("names", range(count_CD.shape[1]))]
    height = min(max(0.2 * len(order), 1.2), 5.0)
    figure = Figure(figsize=(WIDTH, height + 1.0))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 1])
    cells(left, share_CD, cmap=BLUES, vmin=0, vmax=1)
    unit = "tokens" if run.summary.get("task") == "causal_lm" else "rows"
    left.set_title(f"share of the client's {unit}")
    if len(names) <= 40:
        left.set_xticks(range(len(names)), names, rotation=35, ha="right")
    else:
        left.set_xlabel(f"{len(names)} domains")
    client_ticks(left, run, order)
    right.barh(range(len(order)), total_C[:, 0], color=PALE, height=0.72)
    if len(order) <= 30:
        for place, total in enumerate(total_C[:, 0]):
            right.text(total, place, f" {total:,.0f}", va="center", fontsize=7.5, color=INK)
    right.set_title(unit)
    right.set_xticks([])
    right.grid(visible=False)
    right.margins(x=0.25)
    right.spines[["bottom", "left"]].set_visible(False)
    right.tick_params(labelleft=False)
    figure.tight_layout(w_pad=1.5)
    return figure


def largest_shares(run: Run, key: str) -> dict[int, tuple[float, float]]:
    """Return each client's largest real and predicted use of a limit over the rounds, as parts of one, by client.

    Clients without a limit are left out.
    """
    found: dict[int, tuple[float, float]] = {}
    for line in run.ledger:
        if limit := (line.get("budget") or {}).get(key):
            most_real, most_predicted = found.get(line["client"], (0.0, 0.0))
            real, predicted = ((line.get(part) or {}).get(key) or 0 for part in ("real", "predicted"))
            found[line["client"]] = max(most_real, real / limit), max(most_predicted, predicted / limit)
    return found


def _scaled(
    name: str, runs: Sequence[Run], place: Callable[[Mapping[str, Any]], float | None], base: int, unit: str
) -> list[tuple[str, Callable[[Mapping[str, Any]], float | None], float]]:
    """An axis in the unit that keeps its numbers readable; no axis where nothing was counted."""
    largest = max((place(r) or 0 for run in runs for r in run.rounds), default=0)
    if not largest:
        return []
    power = min(max(int(math.log(largest, base)), 0), 5)
    prefix = ("", "K", "M", "G", "T", "P")[power] + ("i" if base == 1024 and power else "")
    return [(f"{name} ({prefix}{unit})", place, float(base) ** power)]


def _value(key: str) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda record: record.get(key)


def _mean(key: str) -> Callable[[Mapping[str, Any]], float | None]:
    def mean(record: Mapping[str, Any]) -> float | None:
        known = [value for value in record.get(key) or () if show.known(value)]
        return float(np.mean(known)) if known else None

    return mean


def _plus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a + b


def _colors(runs: Sequence[Run]) -> list[str]:
    return [PALETTE[place % len(PALETTE)] for place in range(len(runs))]


def _shares(value_LE: np.ndarray) -> np.ndarray:
    positive_LE = np.where(value_LE > 0, value_LE, 0.0)
    total_L = positive_LE.sum(1, keepdims=True)
    return np.divide(positive_LE, total_L, out=np.zeros_like(positive_LE), where=total_L > 0)
