"""The two pictures of a comparison: every tier's distance from the first system, and quality against bytes moved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from statistics import fmean

import matplotlib as mpl
from matplotlib.figure import Figure

from fedmoe_core.base.wording import visible
from fedmoe_core.comparison.run_figures import RunFigures
from fedmoe_core.comparison.significance import mean_interval
from fedmoe_core.reporting.theme import GRID, INK, MUTED, PALETTE, RC

WIDTH = 10.4  # inches, as the figures of a report
LINES = ("-", "--", ":", "-.")  # seven colours do not reach for a dozen systems


def styles(labels: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Assign a colour and a line style to each system; no two share both."""
    kinds = [(color, line) for line in LINES for color in PALETTE]
    return dict(zip(labels, cycle(kinds)))


def tiers(runs: Mapping[str, Sequence[RunFigures]]) -> Figure:
    """Draw one panel per tier: each system's clients against the first system's, paired by seed, with 95 % intervals.

    Paired, because seeds differ in their data by far more than systems differ on the same data.
    """
    subject, first = next(iter(runs)), next(iter(runs.values()))[0]
    names, labels = list(first.tier_mean), list(runs)
    scale = 100.0 if first.accuracy else 1.0
    with mpl.rc_context(RC):
        figure = Figure(figsize=(WIDTH, 0.26 * len(labels) + 1.3))
        grid = figure.subplots(1, len(names), sharey=True, sharex=True, squeeze=False)[0]
        for axes, tier in zip(grid, names, strict=True):
            own = {run.seed: run.tier_mean[tier] * scale for run in runs[subject]}
            for place, label in enumerate(labels):
                of_seed = {run.seed: run.tier_mean[tier] * scale for run in runs[label]}
                gaps = [of_seed[seed] - own[seed] for seed in sorted(set(own) & set(of_seed))]
                color = INK if all(run.budgeted for run in runs[label]) else MUTED
                if len(gaps):
                    gap = mean_interval(gaps)
                    half = 0.0 if len(gaps) < 2 else gap.half_width
                    axes.errorbar(gap.mean, -place, xerr=half, fmt="o", ms=4.5, color=color, lw=1.4, mec="white")
            axes.set_yticks([-place for place in range(len(labels))], list(map(visible, labels)))
            mean = fmean(own.values())
            axes.set_title(f"{visible(tier)}: {mean:.1f} %" if first.accuracy else f"{visible(tier)}: {mean:.3f}")
            axes.set_xlabel("points of accuracy" if first.accuracy else "nats of loss")
            axes.axvline(0, color=GRID, lw=1.6, zorder=0)
        better = "right is better" if first.accuracy else "left is better"
        figure.suptitle(
            f"Each system minus {visible(subject)} (its mean is in the title); {better}; grey: over the budget",
            fontsize=9.5,
        )
        figure.tight_layout(w_pad=1.4)
    return figure


def quality_by_traffic(runs: Mapping[str, Sequence[RunFigures]]) -> Figure:
    """Draw the mean over clients and seeds against bytes moved both ways."""
    kinds = styles(list(runs))
    first = next(iter(runs.values()))[0]
    scale = 100.0 if first.accuracy else 1.0
    with mpl.rc_context(RC):
        figure = Figure(figsize=(WIDTH, 4.4))
        axes = figure.subplots()
        for label, of_seed in runs.items():
            points = list(zip(*(run.curve for run in of_seed), strict=False))  # rounds that every seed has
            moved = [fmean(spent.bytes_moved for spent, _ in point) / 2**30 for point in points]
            quality = [fmean(value for _, value in point) * scale for point in points]
            color, line = kinds[label]
            axes.plot(moved, quality, color=color, ls=line, lw=1.8, label=visible(label))
        axes.set_xlabel("moved, both ways, all clients (GiB)")
        axes.set_title(f"{'accuracy (%)' if first.accuracy else 'held-out loss (nats)'}, mean over clients and seeds")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8.5)
        figure.tight_layout()
    return figure
