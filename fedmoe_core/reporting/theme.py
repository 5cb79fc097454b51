"""How a report looks: palette and matplotlib's settings; ``page.css`` has the rest."""

from __future__ import annotations

from typing import Any

from matplotlib.colors import LinearSegmentedColormap, ListedColormap

# Okabe and Ito's palette, in the order in which runs take them.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5b5b5b")
INK, MUTED, GRID, EMPTY = "#1f2933", "#66727f", "#e3e8ed", "#f0f3f5"
PALE = "#9cc6e4"
BLUE, ORANGE = PALETTE[0], PALETTE[1]
BLUES = LinearSegmentedColormap.from_list("fedmoe", ["#f0f3f5", "#a8cbe3", "#0072b2", "#003a5c"])
HELD = ListedColormap([EMPTY, PALE, BLUE])
RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # only measures; the page's own fonts, which are narrower, replace it
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # names of clients are text, whatever signs they hold
    "axes.labelcolor": MUTED,
    "axes.edgecolor": "#aab4bd",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.formatter.useoffset": False,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "svg.fonttype": "none",
    "svg.hashsalt": "fedmoe",
    "legend.frameon": False,
    "image.interpolation": "none",
}
