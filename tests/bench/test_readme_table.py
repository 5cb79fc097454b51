"""The README's short table says what the committed records say, in the order of the loss."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

HOUSE = Path(__file__).parents[2]
STUDY = HOUSE / "bench/results/study"
SYSTEMS = {
    "HFedMoE+ (ours)": "hfedmoe_plus",
    "most activated experts": "most_activated",
    "HFedMoE": "hfedmoe",
    "FedMoE": "fedmoe",
    "Flux": "flux",
    "smallest model for all": "fedavg_smallest",
    "FLEX-MoE": "flex_moe",
    "random experts": "random",
    "FedAvg, over the budgets": "fedavg",
}


def record(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((STUDY / name / "compare.json").read_text())
    return loaded


def rows_of_the_page() -> dict[str, list[str]]:
    text = (HOUSE / "README.md").read_text()
    table = re.search(r"\| system \| loss .*?\n\n", text, re.DOTALL)
    assert table is not None
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[0].strip().splitlines()[2:]]
    return {row[0]: row[1:] for row in rows}


def test_all_rows_are_there() -> None:
    assert list(rows_of_the_page()) == list(SYSTEMS)
    assert all(len(row) == 3 for row in rows_of_the_page().values())  # with the system, four columns


def in_words(row: dict[str, Any]) -> str:
    """Megabytes to the target, and in how many seeds it was reached where that is not all of them."""
    if row["to_target"] is None:
        return "not reached"
    megabytes = round(row["to_target"]["bytes_moved"] / 1e6)
    some = f" ({row['reached']} of {len(row['seeds'])})" if row["reached"] < len(row["seeds"]) else ""
    return f"{megabytes}{some}" if megabytes else "at the start"


@pytest.mark.parametrize("title", SYSTEMS)
def test_a_row_says_what_the_records_say(title: str) -> None:
    loss, accuracy, moved = rows_of_the_page()[title]
    system = SYSTEMS[title]
    stdlib, news = record("stdlib"), record("ag_news-0.1")
    assert float(loss.strip("*")) == round(fmean(run["clients"] for run in stdlib["runs"][system]), 3)
    assert float(accuracy) == round(100 * fmean(run["clients"] for run in news["runs"][system]), 1)
    row = next(row for row in stdlib["rows"] if row["label"] == system)
    assert moved == in_words(row)
    assert ("**" in loss) == row["qualities"]["clients"]["best"]


def test_what_is_over_the_budgets_is_named_so() -> None:
    for title, system in SYSTEMS.items():
        inside = all(run["budgeted"] for run in record("stdlib")["runs"][system])
        assert inside != title.endswith("over the budgets")
