"""The tables of docs/results.md and docs/study.md, from the committed records of `fedmoe compare`.

    python -m bench.study.table                     # all systems, in Markdown
    python -m bench.study.table ablation-plus       # one ablation, every variant against the first

Each cell is the mean over seeds; in brackets the distance from the first system, paired by seed, with a star where that
is significant (paired t and Wilcoxon, Holm, 5 %). A dagger marks systems that some budget does not allow.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from bench.common import checkout
from bench.common.markdown import table
from fedmoe_core.comparison.significance import Comparison

STUDIES = {
    "ag_news-0.1": "AG News, Dirichlet 0.1",
    "ag_news-0.5": "AG News, Dirichlet 0.5",
    "stdlib": "standard library",
}
RESULTS = checkout.RESULTS / "study"


def cell(quality: Mapping[str, Any], *, accuracy: bool) -> str:
    """Write one quality: its mean, and the distance from the subject with a star where it is significant."""
    if quality["value"] is None:
        return "n/a"
    scale, digits = (100.0, 1) if accuracy else (1.0, 3)
    text = f"{quality['value']['mean'] * scale:.{digits}f}"
    gap = quality["against_subject"]
    if gap is not None:
        text += f" ({gap['difference'] * scale:+.{digits}f}{'*' if Comparison(**gap).significant else ''})"
    return f"**{text}**" if quality["best"] else text


def lines(records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Write the table of systems: a line for each, three columns for each study."""
    heads = ["system"]
    for name, record in records.items():
        seeds = len(record["seeds"])
        unit = "accuracy, %" if record["rows"][0]["accuracy"] else "loss, nats"
        heads += [f"{STUDIES[name]} ({unit}, {seeds} seeds): clients", "lower tiers", "MB to target"]
    rows_of_cells = []
    by_label = [{row["label"]: row for row in record["rows"]} for record in records.values()]
    for label in by_label[0]:
        cells = [label]
        for rows in by_label:
            row = rows[label]
            cells += [cell(row["qualities"][name], accuracy=row["accuracy"]) for name in ("clients", "lower tiers")]
            reached, seeds = row["reached"], len(row["seeds"])
            price = f"{row['to_target']['bytes_moved'] / 1e6:.0f}" if row["to_target"] else "not reached"
            cells.append(price if reached in (0, seeds) else f"{price} ({reached} of {seeds})")
            if not row["budgeted"]:
                cells[-3] += " †"
        rows_of_cells.append(cells)
    return table(heads, rows_of_cells)


def departures(record: Mapping[str, Any]) -> list[str]:
    """Write the table of an ablation: a line for each variant, what it is worth to all clients and in each tier."""
    rows = record["rows"]
    unit = "accuracy, %" if rows[0]["accuracy"] else "loss, nats"
    names = ["global", "clients", *(name for name in rows[0]["qualities"] if name.startswith("mean "))]
    heads = [name.removeprefix("mean ") for name in names]
    cells = []
    for row in rows:
        label = row["label"] if row["budgeted"] else f"{row['label']} †"
        cells.append([label, *(cell(row["qualities"][name], accuracy=row["accuracy"]) for name in names)])
    return table([f"variant ({unit}, {len(record['seeds'])} seeds)", *heads], cells)


def read(name: str) -> dict[str, Any]:
    """Read the record of a study by its directory's name."""
    record: dict[str, Any] = json.loads((RESULTS / name / "compare.json").read_text("utf-8"))
    return record


def main(names: list[str]) -> None:
    """Print the table of systems of the studies that are there, or those of the named ablations."""
    for name in names:
        print("\n".join(departures(read(name))))
    if not names:
        there = [name for name in STUDIES if (RESULTS / name / "compare.json").is_file()]
        print("\n".join(lines({name: read(name) for name in there})))


if __name__ == "__main__":
    main(sys.argv[1:])
