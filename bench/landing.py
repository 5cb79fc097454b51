"""The README's one picture: what clients' models gain for the bytes that all devices together sent and received.

python -m bench.landing    # reads bench/results/study/stdlib/compare.json, writes docs/landing.png
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean

import matplotlib as mpl
from matplotlib.figure import Figure

from bench.common.checkout import RESULTS, ROOT
from fedmoe_core.comparison.record import Earlier
from fedmoe_core.config.systems import TITLES
from fedmoe_core.reporting.theme import BLUE, INK, MUTED, RC

RECORD = RESULTS / "study" / "stdlib" / "compare.json"
SUBJECT = "hfedmoe_plus"
OTHERS = ("most_activated", "hfedmoe", "fedmoe", "flux", "flex_moe", "fedavg_smallest", "random")  # inside the budgets
ORACLE = "fedavg"  # needs memory that the smaller devices lack


def curve(earlier: Earlier, system: str) -> tuple[list[float], list[float]]:
    """Return megabytes moved and loss of the clients' models, means over seeds, at every evaluated round."""
    points = list(zip(*(run.curve for run in earlier.measured[system]), strict=True))
    moved = [fmean(spent.bytes_moved for spent, _ in point) / 1e6 for point in points]
    return moved, [fmean(loss for _, loss in point) for point in points]


def draw(earlier: Earlier) -> Figure:
    """Draw loss against traffic, the subject in colour and the distance to its nearest rival as the one message."""
    own_moved, own_loss = curve(earlier, SUBJECT)
    with mpl.rc_context({**RC, "font.size": 10}):
        figure = Figure(figsize=(8.4, 4.3))
        axes = figure.subplots()
        ends: list[tuple[float, float, str, str]] = []
        for system in OTHERS:
            moved, loss = curve(earlier, system)
            axes.plot(moved, loss, color=MUTED, lw=1.2, alpha=0.75)
            ends.append((loss[-1], moved[-1], TITLES[system], MUTED))
        moved, loss = curve(earlier, ORACLE)
        inside = [place for place, x in enumerate(moved) if x <= 1.1 * own_moved[-1]]
        axes.plot([moved[i] for i in inside], [loss[i] for i in inside], color=MUTED, lw=1.2, ls=":")
        ends.append((loss[inside[-1]], moved[inside[-1]], "FedAvg (no budget allows it)", MUTED))
        axes.plot(own_moved, own_loss, color=BLUE, lw=2.6, marker="o", ms=4)
        ends.append((own_loss[-1], own_moved[-1], TITLES[SUBJECT], BLUE))
        height = -1.0
        for loss_end, x, text, color in sorted(ends):
            height = max(loss_end, height + 0.033)  # labels must not lie on each other
            weight = "bold" if color == BLUE else "normal"
            axes.annotate(text, (x, loss_end), (335, height), color=color, fontsize=9, weight=weight, va="center")
        _message(axes, earlier, own_moved, own_loss)
        axes.set_xlim(-5, 330)
        axes.set_xlabel("moved by all clients, down and up (MB)")
        axes.set_title("held-out loss of the clients' own models (nats; less is better)", loc="left", fontsize=10)
        figure.tight_layout(rect=(0, 0, 0.99, 1))
    return figure


def _message(axes: mpl.axes.Axes, earlier: Earlier, moved: list[float], loss: list[float]) -> None:
    """Say where the subject is already as good as its best rival ends, and what either had moved by then."""
    rival = min(OTHERS, key=lambda system: curve(earlier, system)[1][-1])
    rival_moved, rival_loss = curve(earlier, rival)
    reached = next(place for place, value in enumerate(loss) if value <= rival_loss[-1])
    text = (
        f"{loss[reached]:.2f} nats after {moved[reached]:.0f} MB;\n"
        f"the next best system ends at {rival_loss[-1]:.2f} after {rival_moved[-1]:.0f} MB"
    )
    arrow = {"arrowstyle": "->", "color": INK, "lw": 0.9, "shrinkB": 6}
    axes.annotate(
        text, (moved[reached], loss[reached]), (moved[reached], 4.84), color=INK, fontsize=9.5, arrowprops=arrow
    )


def main() -> None:
    """Draw and write."""
    parser = argparse.ArgumentParser(prog="python -m bench.landing", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs/landing.png")
    draw(Earlier.read(RECORD)).savefig(parser.parse_args().out, dpi=130)


if __name__ == "__main__":
    main()
