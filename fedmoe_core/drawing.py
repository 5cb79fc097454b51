"""From a matplotlib figure to inline SVG, and the marks that several figures share."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedmoe_core.runs import Run
from fedmoe_core.theme import FONTS, INK, RC


def svg(draw: Callable[..., Figure | None], *args: Any, name: str) -> str | None:
    """Return what ``draw`` makes as an SVG element without outside references; None where there is nothing to draw.

    Args:
        draw: one of the functions below.
        name: a word unique on the page; prefixes every id inside the SVG, and labels it for screen readers.
    """
    with mpl.rc_context(RC):
        figure = draw(*args)
        if figure is None:
            return None
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", bbox_inches="tight", pad_inches=0.04, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r"'DejaVu Sans'", FONTS, text)
    prefix = re.sub(r"\W", "-", name)
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r"url\(#", f"url(#{prefix}-", text)
    text = re.sub(r'href="#', f'href="#{prefix}-', text)
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', f'role="img" aria-label="{name}"', text, count=1)


def cells(axes: Axes, table: np.ndarray, **colours: Any) -> None:
    """Draw a heat map of separate cells: thin white lines between them while they are few."""
    axes.imshow(np.ma.masked_invalid(table), aspect="auto", **colours)
    axes.grid(visible=False)
    axes.spines[["bottom", "left"]].set_visible(False)
    rows, columns = table.shape
    if rows <= 60 and columns <= 80:
        axes.hlines(np.arange(rows + 1) - 0.5, -0.5, columns - 0.5, color="white", lw=1.0)
        axes.vlines(np.arange(columns + 1) - 0.5, -0.5, rows - 0.5, color="white", lw=1.0)


def client_ticks(axes: Axes, run: Run, order: Sequence[int]) -> None:
    if len(order) <= 30:
        axes.set_yticks(range(len(order)), [run.client_name(client) for client in order])
    else:
        axes.set_yticks([])
        axes.set_ylabel(f"{len(order)} clients, grouped by tier")


def tier_lines(axes: Axes, run: Run, order: Sequence[int]) -> None:
    tiers = [run.tiers.get(client, "") for client in order]
    for place in range(1, len(tiers)):
        if tiers[place] != tiers[place - 1]:
            axes.axhline(place - 0.5, color=INK, lw=0.9)


def expert_ticks(axes: Axes, experts: int) -> None:
    axes.set_xticks(range(0, experts, 1 if experts <= 10 else 2 if experts <= 24 else -(-experts // 12)))


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write names at the right end of lines, pushed apart until none covers another."""
    low, high = axes.get_ylim()
    gap = 0.075 * (high - low)
    placed = low - gap
    for x, y, text, colour in sorted(ends, key=lambda end: end[1]):
        placed = max(y, placed + gap)
        axes.annotate(
            text,
            (x, placed),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize=8.5,
            fontweight="bold",
            annotation_clip=False,
        )
