"""From a matplotlib figure to inline SVG, and the marks that several figures share."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedmoe_core.base.wording import visible
from fedmoe_core.reporting.crowd import percentiles
from fedmoe_core.reporting.run import Run
from fedmoe_core.reporting.theme import BLUE, INK, RC


def svg(draw: Callable[..., Figure | None], *args: Any, name: str, prefix: str) -> Markup | None:
    """Return what ``draw`` makes as an SVG element without outside references; None where there is nothing to draw.

    The element is taken apart and put together again, so that names in it stay text: an edit by regular expressions
    would also find its patterns in the name of a client. Comments, where matplotlib repeats every text, are left out.

    Args:
        draw: a function of ``figures``.
        name: says what the figure shows, to screen readers.
        prefix: a word unique on the page, of letters and digits; begins every id inside the SVG.
    """
    with mpl.rc_context(RC):
        figure = draw(*args)
        if figure is None:
            return None
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", bbox_inches="tight", pad_inches=0.04, metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for child in root.findall("{*}metadata"):
        root.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {
            key.rpartition("}")[2]: _placed(key.rpartition("}")[2], value, prefix)
            for key, value in element.attrib.items()
        }
    for size in ("width", "height"):
        root.attrib.pop(size)
    root.attrib |= {"role": "img", "aria-label": visible(name)}
    # The only markup that Python makes: an element tree, whose texts and attributes are escaped as it is written.
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _placed(key: str, value: str, prefix: str) -> str:
    """Return an attribute as the page needs it: ids of its own figure, and the page's fonts."""
    if key == "id":
        return f"{prefix}-{value}"
    if key == "href" and value.startswith("#"):
        return f"#{prefix}-{value[1:]}"
    return value.replace("url(#", f"url(#{prefix}-").replace("'DejaVu Sans'", "var(--fonts)")


def cells(axes: Axes, table: np.ndarray, **colors: Any) -> None:
    """Draw a heat map of separate cells: thin white lines between them while they are few."""
    axes.imshow(np.ma.masked_invalid(table), aspect="auto", **colors)
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


def bands(axes: Axes, x: Sequence[float], value_RC: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw in which bands 90 % and 50 % of the losses lie, round by round; return most, mean and least, each (R,).

    Args:
        x: the rounds, R.
        value_RC: NaN where a client has no value; a round without any is left out of the bands.
    """
    known = [row[np.isfinite(row)] for row in value_RC]
    percent_RP = np.array([percentiles(row) for row in known])
    for low, high, alpha in ((0, 4, 0.16), (1, 3, 0.3)):
        axes.fill_between(x, percent_RP[:, low], percent_RP[:, high], color=BLUE, alpha=alpha, lw=0)
    ends = [[pick(row) if row.size else np.nan for row in known] for pick in (np.max, np.mean, np.min)]
    return np.array(ends[0]), np.array(ends[1]), np.array(ends[2])


def spans(axes: Axes, place: float, values: Sequence[float], *, color: str = BLUE) -> None:
    """Draw the spread of values as a bar at ``place``: pale for 90 % of them, strong for 50 %, a line at the median.

    Without any finite value nothing is drawn.
    """
    low, first, middle, third, high = percentiles(values)
    if np.isfinite(middle):
        axes.barh(place, high - low, left=low, height=0.5, color=color, alpha=0.25)
        axes.barh(place, third - first, left=first, height=0.5, color=color, alpha=0.75)
        axes.plot([middle] * 2, [place - 0.34, place + 0.34], color=INK, lw=1.6)


def group_ticks(axes: Axes, names: Sequence[str]) -> None:
    """Name the rows of a figure by tier."""
    axes.set_yticks(range(len(names)), [short(name) for name in names])


def short(name: str) -> str:
    """Cut the name of a tier to the 30 signs for which a figure has room."""
    return name if len(name) <= 30 else f"{name[:29]}…"


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write names at the right end of lines, pushed apart until none covers another."""
    low, high = axes.get_ylim()
    gap = 0.075 * (high - low)
    placed = low - gap
    for x, y, text, color in sorted(ends, key=lambda end: end[1]):
        placed = max(y, placed + gap)
        axes.annotate(
            text,
            (x, placed),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            color=color,
            fontsize=8.5,
            fontweight="bold",
            annotation_clip=False,
        )


def against_limit(axes: Axes, label: str, most: float) -> None:
    """Finish a panel of shares of a limit, in per cent: a line at 100, and room for the largest share."""
    axes.axvline(100, color=INK, lw=1.6)
    axes.set_xlim(0, max(106.0, 1.05 * most))
    axes.set_xticks([0, 50, 100])
    axes.grid(visible=False)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_title(label)
