"""The part `plot`: a file of results as a table in Markdown and as plots, and how it stands against the goals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.common.markdown import table
from bench.gpu.goals import summary
from bench.gpu.measure.store import LISTS, NOT_A_GPU, Record

_PASSES = ("fwd", "bwd", "fwd+bwd")
_COLUMNS = (
    ("ms", "ms", "{:.3f}"),
    ("TFLOP/s", "TFLOP/s", "{:.1f}"),
    ("TB/s", "TB/s", "{:.2f}"),
    ("% of roofline", "percent_of_roofline", "{:.0f}"),
    ("host ms", "host ms", "{:.2f}"),
    ("launches", "launches", "{}"),
    ("MB", "MB", "{:.0f}"),
    ("MB kept", "MB kept", "{:.0f}"),
    ("times best peer", "ratio_to_best_peer", "{:.2f}"),
)


def from_file(path: Path) -> list[Path]:
    """Write the table and the plots of a file of results, wherever it was made; lists that it lacks are empty."""
    return write({name: [] for name in LISTS} | json.loads(path.read_text()), path)


def write(data: Record, path: Path) -> list[Path]:
    """Put the table and the plots next to the JSON file at `path`; return what was written."""
    text = path.with_suffix(".md")
    text.write_text(markdown(data))
    return [text, *_plots(data, path)]


def markdown(data: Record) -> str:
    """Write everything in the file that a reader needs, numbers that are missing as a dash."""
    about = data["about"]
    title = "Rehearsal" if about["rehearsal"] else about["gpu"]
    lines = [f"# {title}, {about['date']}", ""]
    if about["rehearsal"]:
        lines += [f"**{NOT_A_GPU}.**", ""]
    keys = ("gpu", "driver", "cuda", "cpu", "torch", "triton", "transformers", "python", "commit", "kernels", "harness")
    lines += [f"- {key}: {about[key]}" for key in keys if about.get(key)]
    lines += [f"- reached here, {name}: {value:.4g}" for name, value in data["ceilings"].items()]
    lines += ["", "TFLOP/s count what the case asks for, whatever a contender computes beyond it. MB (10^6 bytes) are"]
    lines += ["stored weights and the peak of one step; MB kept is what lies between forward and backward, y included."]
    lines += ["", "## Goals", "", *(f"- {line.strip()}" for line in summary(data)), ""]
    lines += _checks(data)
    for shape in _ordered(data["rows"], "shape"):
        lines += _shape_table([row for row in data["rows"] if row["shape"] == shape], shape)
    lines += _routing(data)
    lines += _models(data)
    lines += _kernels(data)
    lines += _left_out(data)
    return "\n".join(lines) + "\n"


def _checks(data: Record) -> list[str]:
    counts: dict[str, int] = {}
    for check in data["checks"]:
        counts[check["status"]] = counts.get(check["status"], 0) + 1
    found = ", ".join(f"{count} {status}" for status, count in counts.items()) or "none was run"
    lines = ["## Checks", "", f"{found}.", ""]
    odd = [check for check in data["checks"] if check["status"] != "passed"]
    lines += [f"- {check['status']}: {check['name']}: {check['detail']}" for check in odd]
    return [*lines, ""] if odd else lines


def _shape_table(rows: list[Record], shape: str) -> list[str]:
    lines = [f"## {shape} (T, H, I, E, K) = {tuple(rows[0]['sizes'])}, {rows[0]['dtype']}", ""]
    if any(row.get("red") for row in rows):
        lines += [f"**Timed although {len(rows[0]['red'])} checks are red; see Checks above.**", ""]
    heads = ["case", "pass", "launch", "contender", *(head for head, _, _ in _COLUMNS)]
    cells = []
    for row in rows:
        named = [row["case"], row["pass"], row["launch"], row["peer"] + (" (tuned)" if row.get("tiles") else "")]
        cells.append([*named, *(_cell(row.get(key), form) for _, key, form in _COLUMNS)])
    return [*lines, *table(heads, cells, numbers=len(_COLUMNS)), ""]


def _section(title: str, heads: tuple[str, ...], rows: list[list[str]], numbers: int) -> list[str]:
    """Write a title and a table; nothing without rows."""
    return [f"## {title}", "", *table(heads, rows, numbers=numbers), ""] if rows else []


def _routing(data: Record) -> list[str]:
    """List routing alone, device and host beside each other."""
    rows = []
    for row in data["routing"]:
        sizes = ", ".join(map(str, row["sizes"]))
        times = [f"{row[key]:.1f}" for key in ("us", "host us")]
        rows.append([f"{row['router']} ({sizes})", row["pass"], row["peer"], *times])
    return _section("Routing alone", ("router (T, E, K)", "pass", "contender", "us", "host us"), rows, 2)


def _models(data: Record) -> list[str]:
    """List whole models: tokens a second of a forward and backward."""
    rows = []
    for row in data["models"]:
        times = [f"{row['tokens/s']:.0f}", *(f"{row[key]:.2f}" for key in ("ms", "host ms"))]
        rows.append([row["model"], " x ".join(map(str, row["batch"])), row["peer"], *times])
    heads = ("model", "sequences x length", "experts by", "tokens/s", "ms", "host ms")
    return _section("Whole models, forward and backward", heads, rows, 3)


def _kernels(data: Record) -> list[str]:
    """List single launches next to their predictions."""
    forms = {"ms": "{:.4f}", "expected ms": "{:.4f}", "TFLOP/s": "{:.0f}", "TB/s": "{:.2f}"}
    forms["percent_of_roofline"] = "{:.0f}"
    rows = [
        [row["case"], row["kernel"], *(_cell(row[key], form) for key, form in forms.items())] for row in data["kernels"]
    ]
    heads = ("case", "kernel", "ms", "predicted ms", "TFLOP/s", "TB/s", "% of roofline")
    return _section("Single launches, cold", heads, rows, 5)


def _left_out(data: Record) -> list[str]:
    """List the contenders that were not timed, and why; the same reason for many cases in one line."""
    where: dict[tuple[str, str, str, str], list[str]] = {}
    for record in data["left_out"]:
        key = record["peer"], record.get("launch") or "", record["status"], record["reason"]
        where.setdefault(key, []).append(f"{record['shape']}/{record['case']}" if record.get("shape") else "everywhere")
    lines = ["## Not timed", ""] if where else []
    for (peer, launch, status, reason), places in where.items():
        at = places[0] if len(places) == 1 else f"{places[0]} and {len(places) - 1} more"
        lines.append(f"- {peer} ({launch}): {status} at {at}: {reason}" if launch else f"- {peer}: {status}: {reason}")
    details = dict.fromkeys(f"- {row['peer']}: {row['detail']}" for row in data["rows"])
    return [*lines, "", "## Who ran", "", *details]


def _cell(value: Any, form: str) -> str:
    return "-" if value is None else form.format(value)


def _ordered(rows: list[Record], key: str) -> list[str]:
    return list(dict.fromkeys(row[key] for row in rows))


def _plots(data: Record, path: Path) -> list[Path]:
    """Draw rates by shape, speed over the best peer by case, memory by case: PNG files, none without rows."""
    import matplotlib  # half of this script's users have no display and some no matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    written = []
    for name, key, pass_, pick in (
        ("rate", "TFLOP/s", "fwd+bwd", {"case": "all"}),
        ("rate-forward", "TFLOP/s", "fwd", {"case": "all"}),
        ("roofline", "percent_of_roofline", "fwd+bwd", {"peer": "fedmoe"}),
        ("ratio", "ratio_to_best_peer", "fwd+bwd", {"peer": "fedmoe"}),
        ("memory", "MB", "fwd+bwd", {"shape": (_ordered(data["rows"], "shape") or [""])[0]}),
    ):
        rows = [r for r in data["rows"] if r["pass"] == pass_ and r["launch"] == "eager" and r.get(key) is not None]
        rows = [row for row in rows if all(row[field] == value for field, value in pick.items())]
        if not rows:
            continue
        figure = Figure(figsize=(11, 4.5), layout="constrained")
        across, among = ("case", "peer") if "shape" in pick else ("shape", "peer" if "case" in pick else "case")
        _bars(figure.add_subplot(), rows, across, among, key)
        chosen = ", ".join(f"{value}" for value in pick.values())
        warning = f"\n{NOT_A_GPU}" if data["about"]["rehearsal"] else ""
        about = f"{data['about']['gpu'] or data['about']['cpu']}, {data['about']['commit']}"
        figure.suptitle(f"{key}, {pass_}, {chosen} ({about}){warning}", fontsize=10)
        written.append(path.with_name(f"{path.stem}-{name}.png"))
        figure.savefig(written[-1], dpi=130)
    return written


def _bars(axes: Any, rows: list[Record], across: str, among: str, key: str) -> None:
    """Draw grouped bars: a group per `across`, a colour per `among`; a bar that is missing was not measured."""
    groups, series = _ordered(rows, across), _ordered(rows, among)
    width = 0.8 / len(series)
    for i, name in enumerate(series):
        heights = {row[across]: row[key] for row in rows if row[among] == name}
        places = [j + (i - (len(series) - 1) / 2) * width for j, group in enumerate(groups) if group in heights]
        axes.bar(places, [heights[group] for group in groups if group in heights], width, label=name)
    axes.set_xticks(range(len(groups)), groups, rotation=20, ha="right", fontsize=8)
    axes.set_ylabel(key.replace("_", " "))
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    if key == "ratio_to_best_peer":
        axes.axhline(1, color="black", linewidth=0.8)
    axes.grid(axis="y", alpha=0.3)
