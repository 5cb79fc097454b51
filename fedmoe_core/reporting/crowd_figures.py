"""The figures of a run of many clients: a row or a panel for each tier, where a small run has one for each client."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedmoe_core.base import show
from fedmoe_core.reporting import crowd
from fedmoe_core.reporting.drawing import (
    against_limit,
    bands,
    cells,
    expert_ticks,
    group_ticks,
    label_ends,
    short,
    spans,
)
from fedmoe_core.reporting.figures import RESOURCES, WIDTH, largest_shares
from fedmoe_core.reporting.run import Run
from fedmoe_core.reporting.theme import BLUES, INK, ORANGE, PALETTE

ROW = 0.3  # inches for a tier, which leaves its numbers room


def spread(run: Run) -> Figure | None:
    """Draw the losses of each tier's clients per round as bands, one panel a tier; None where there is only one."""
    rounds, loss_RC = crowd.loss_table(run)
    groups = crowd.groups(run)
    if not rounds or len(groups) < 2:
        return None
    columns = 2 if len(groups) in (2, 4) else 3
    rows = -(-len(groups) // columns)
    figure = Figure(figsize=(WIDTH, 2.7 * rows))
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    for axes in grid[len(groups) :]:
        axes.set_visible(False)
    drawn: list[tuple[Axes, list[tuple[float, float, str, str]]]] = []
    for axes, group in zip(grid, groups, strict=False):
        members = np.array([client for client in group.members if client < loss_RC.shape[1]], int)
        axes.set_title(f"{short(group.name)}: {show.plural(len(group.members), 'client')}")
        known = np.isfinite(loss_RC[-1, members])
        if not known.any():
            continue
        most_R, mean_R, _ = bands(axes, rounds, loss_RC[:, members])
        worst = int(members[np.argmax(np.where(known, loss_RC[-1, members], -np.inf))])
        lines = ((most_R, ORANGE, f"worst: {run.client_name(worst)}"), (mean_R, INK, "mean"))
        for y, color, _ in lines:
            axes.plot(rounds, y, color=color, lw=1.4)
        drawn.append((axes, [(rounds[-1], y[-1], text, color) for y, color, text in lines]))
        axes.set_xlabel("rounds")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    for axes, ends in drawn:  # once all are drawn: they share their scale
        label_ends(axes, ends)
    figure.tight_layout(w_pad=2.0)
    return figure


def holdings(run: Run) -> Figure | None:
    """Show which share of a tier's clients held and trained each expert, early and late in the run; up to four layers.

    A client counts once for each round in which it took part.
    """
    records = [record for record in run.clients if record.get("held_LE")]
    if not records:
        return None
    numbers = sorted({record["round"] for record in records})
    part = max(1, round(len(numbers) / 4))
    windows = [("held", "held_LE", numbers[:part]), ("held", "held_LE", numbers[-part:])]
    windows += [("trained", "trained_LE", numbers[-part:])]
    groups = crowd.groups(run)
    tables = [shares_held(records, groups, key, within) for _, key, within in windows[len(numbers) == 1 :]]
    layers, experts = tables[0].shape[1:]
    chosen = sorted({round(place) for place in np.linspace(0, layers - 1, min(layers, 4))})
    height = ROW * len(groups)
    figure = Figure(figsize=(WIDTH, (height + 0.42) * len(chosen) + 0.4))
    grid = figure.subplots(len(chosen), len(tables), sharex=True, sharey=True, squeeze=False)
    for row, layer in zip(grid, chosen, strict=True):
        for axes, share_GLE, (word, _, within) in zip(row, tables, windows[len(numbers) == 1 :], strict=True):
            cells(axes, share_GLE[:, layer], cmap=BLUES, vmin=0, vmax=1)
            axes.set_title(f"layer {layer}, {word}, {_rounds(within)}")
            if experts <= 16:
                _write(axes, share_GLE[:, layer])
        group_ticks(row[0], [group.name for group in groups])
    for axes in grid[-1]:
        expert_ticks(axes, experts)
        if experts > 24:  # three panels in a row: twelve numbers of three digits would touch
            axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        axes.set_xlabel("expert")
    figure.tight_layout(w_pad=1.2, h_pad=1.0)
    return figure


def shares_held(
    records: Sequence[Mapping[str, Any]], groups: Sequence[crowd.Group], key: str, rounds: Sequence[int]
) -> np.ndarray:
    """Return for each group the share of its clients' rounds in which an expert was held or trained, (G, L, E).

    Args:
        records: client records that hold ``key``.
        groups: whose clients are counted together; one that took no part has NaN.
        key: ``held_LE`` or ``trained_LE``.
        rounds: the rounds that count.
    """
    place_of = {client: place for place, group in enumerate(groups) for client in group.members}
    within = set(rounds)
    count_GLE = np.zeros((len(groups), *np.shape(records[0][key])))
    total_G = np.zeros(len(groups))
    for record in records:
        if record["round"] in within:
            count_GLE[place_of[record["client"]]] += record[key]
            total_G[place_of[record["client"]]] += 1
    empty_GLE = np.full_like(count_GLE, np.nan)
    total_G11 = total_G[:, None, None]
    return np.divide(count_GLE, total_G11, out=empty_GLE, where=np.broadcast_to(total_G11 > 0, count_GLE.shape))


def budgets(run: Run) -> Figure | None:
    """Draw by tier how much of every limit its clients used at most in any round, against the hard line at 100 %."""
    groups = crowd.groups(run)
    panels = [(label, shares) for key, (label, _) in RESOURCES.items() if (shares := largest_shares(run, key))]
    if not panels:
        return None
    figure = Figure(figsize=(WIDTH, ROW * len(groups) + 0.9))
    grid = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    most = max(100 * max(pair) for _, shares in panels for pair in shares.values())
    for axes, (label, shares) in zip(grid, panels, strict=True):
        for place, group in enumerate(groups):
            pairs = [shares[client] for client in group.members if client in shares]
            if not pairs:
                axes.text(3, place, "no limit", va="center", fontsize=7.5, color="#98a3ad")
                continue
            real = [100 * pair[0] for pair in pairs]
            spans(axes, place, real)
            predicted, top = max(100 * pair[1] for pair in pairs), max(real)
            axes.plot([predicted] * 2, [place - 0.4, place + 0.4], color=PALETTE[5], lw=2)
            axes.plot([top], [place], "o", ms=4, color=ORANGE if top > 100 else INK)
        against_limit(axes, label, most)
    group_ticks(grid[0], [group.name for group in groups])
    grid[0].set_ylim(len(groups) - 0.4, -0.6)
    grid[len(grid) // 2].set_xlabel("% of the limit")
    figure.tight_layout(w_pad=1.5)
    return figure


def data_split(run: Run) -> Figure | None:
    """Show by tier what data its clients hold: by label or domain, how much each has, and how one-sided each is."""
    if not run.partition or not run.partition.get("counts"):
        return None
    count_CD = np.array(run.partition["counts"], float)
    groups = [(g, np.array([c for c in g.members if c < len(count_CD)], int)) for g in crowd.groups(run)]
    held_GD = np.array([count_CD[members].sum(0) for _, members in groups])
    share_GD = held_GD / np.maximum(held_GD.sum(1, keepdims=True), 1)
    total_C = count_CD.sum(1)
    names = [str(name) for name in run.partition.get("names", range(count_CD.shape[1]))]
    figure = Figure(figsize=(WIDTH, ROW * len(groups) + 1.2))
    left, middle, right = figure.subplots(1, 3, sharey=True, width_ratios=[3, 1.4, 1.4])
    cells(left, share_GD, cmap=BLUES, vmin=0, vmax=1)
    unit = "tokens" if run.summary.get("task") == "causal_lm" else "rows"
    left.set_title(f"share of the tier's {unit}" + (" (%)" if len(names) <= 16 else ""))
    if len(names) <= 16:
        _write(left, share_GD)
    if len(names) <= 40:
        left.set_xticks(range(len(names)), names, rotation=35, ha="right")
    else:
        left.set_xlabel(f"{len(names)} domains")
    panels: list[tuple[Axes, str, Callable[[np.ndarray], np.ndarray]]] = [
        (middle, f"{unit} of a client", lambda members: total_C[members]),
        (right, "% in its largest part", lambda members: 100 * _largest_part(count_CD[members], total_C[members])),
    ]
    for axes, title, values in panels:
        for place, (_, members) in enumerate(groups):
            spans(axes, place, values(members).tolist())
        axes.set_title(title)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.spines[["left"]].set_visible(False)
        axes.tick_params(labelleft=False)
    group_ticks(left, [group.name for group, _ in groups])
    figure.tight_layout(w_pad=1.5)
    return figure


def _largest_part(count_MD: np.ndarray, total_M: np.ndarray) -> np.ndarray:
    """Share of each client's largest label or domain, (M,); NaN without data."""
    return np.divide(count_MD.max(1), total_M, out=np.full(len(total_M), np.nan), where=total_M > 0)


def _write(axes: Axes, share: np.ndarray) -> None:
    """Write shares in per cent into the cells of a heat map, whose darkest colour is 100 %."""
    for (row, column), value in np.ndenumerate(share):
        if math.isfinite(value):
            color = "white" if value > 0.5 else INK
            axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=6.5, color=color)


def _rounds(numbers: Sequence[int]) -> str:
    return f"round {numbers[0]}" if len(numbers) == 1 else f"rounds {numbers[0]}–{numbers[-1]}"
