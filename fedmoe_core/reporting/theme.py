"""How a report looks: palette, fonts, matplotlib's settings and the page's CSS."""

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
FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
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

CSS = f"""
:root {{
  color-scheme: light;
  --ink: {INK}; --muted: {MUTED}; --line: {GRID};
}}
* {{ box-sizing: border-box; }}
body {{
  margin: 0 auto; padding: 56px 32px 80px; max-width: 1160px; color: var(--ink); background: #fff;
  font: 15px/1.55 {FONTS}; font-variant-numeric: tabular-nums;
}}
h1 {{ font-size: 34px; line-height: 1.15; letter-spacing: -.02em; margin: 0 0 10px; text-wrap: balance; }}
h2 {{ font-size: 21px; letter-spacing: -.01em; margin: 56px 0 4px; }}
h2.run {{ border-top: 3px solid var(--ink); padding-top: 16px; margin-top: 84px; font-size: 26px; }}
p {{ margin: 4px 0 16px; max-width: 80ch; }}
.lead {{ font-size: 18px; line-height: 1.5; }}
.muted, figcaption, .label {{ color: var(--muted); }}
.problem {{ border-left: 4px solid; padding: 4px 0 4px 16px; font-size: 17px; margin: 14px 0; }}
.tiles {{ display: grid; grid-template-columns: repeat(4, 1fr); gap: 0 32px; margin: 28px 0 8px; }}
.tile {{ border-top: 1px solid var(--line); padding: 12px 0 16px; }}
.tile b {{ display: block; font-size: 23px; line-height: 1.3; letter-spacing: -.01em; font-weight: 650; }}
.label {{ display: block; font-size: 13px; }}
.bad, .problem {{ color: #b23a00; }}
.problem::first-letter {{ text-transform: uppercase; }}
.good {{ color: #00704f; }}
figure {{ margin: 14px 0 0; }}
figure svg {{ display: block; width: 100%; height: auto; overflow: visible; }}
figcaption {{ font-size: 13px; margin-top: 6px; }}
.key {{ display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 5px; }}
.key ~ .key {{ margin-left: 16px; }}
.wide {{ overflow-x: auto; }}
.tall {{ max-height: 460px; overflow: auto; }}
.tall .wide {{ overflow: visible; }}
table {{ border-collapse: collapse; width: 100%; font-size: 13px; }}
th {{
  text-align: right; font-weight: 600; color: var(--muted); border-bottom: 1px solid #aab4bd; vertical-align: bottom;
  position: sticky; top: 0; background: #fff; line-height: 1.25;
}}
td {{ text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }}
th, td {{ padding: 6px 0 6px 16px; }}
.t {{ text-align: left; }}
th:first-child, td:first-child {{ padding-left: 0; }}
td.t:last-child {{ white-space: normal; }}
dl {{
  display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 0 40px; margin: 12px 0;
  font-size: 14px;
}}
dl div {{ display: flex; gap: 12px; border-bottom: 1px solid var(--line); padding: 5px 0; }}
dt {{ color: var(--muted); flex: 0 0 124px; }}
dd {{ margin: 0; overflow-wrap: anywhere; }}
code, pre {{ font-family: ui-monospace, 'SF Mono', Menlo, Consolas, monospace; font-size: 12.5px; }}
pre {{ background: #f6f8fa; padding: 14px 16px; border-radius: 6px; overflow-x: auto; }}
details {{ margin-top: 32px; }}
summary {{ cursor: pointer; color: var(--muted); }}
@media (max-width: 760px) {{ .tiles {{ grid-template-columns: repeat(2, 1fr); }} body {{ padding: 28px 18px; }} }}
@media print {{ body {{ padding: 0; }} figure {{ break-inside: avoid; }} .tall {{ max-height: none; }} }}
"""
