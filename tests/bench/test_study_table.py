"""The README's table of systems is what its command prints from the committed records."""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import study_table  # noqa: E402

RECORDS = {
    name: json.loads((study_table.RESULTS / name / "compare.json").read_text("utf-8"))
    for name in study_table.STUDIES
    if (study_table.RESULTS / name / "compare.json").is_file()
}


def test_the_readme_shows_the_table_as_it_is_printed() -> None:
    assert RECORDS
    assert "\n".join(study_table.lines(RECORDS)) in (ROOT / "README.md").read_text("utf-8")


def test_cells_say_distance_significance_and_what_no_budget_allows() -> None:
    gap = {"difference": -0.02, "pairs": 8, "t_p": 0.01, "wilcoxon_p": 0.2, "family_size": 12}
    quality = {"value": {"mean": 0.75}, "against_subject": gap, "best": True}
    assert study_table.cell(quality, accuracy=True) == "**75.0 (-2.0*)**"
    few = {**quality, "best": False, "against_subject": {**gap, "family_size": 2}}  # ranks could tell, and do not
    assert study_table.cell(few, accuracy=False) == "0.750 (-0.020)"
    assert study_table.cell({**quality, "value": None}, accuracy=True) == "n/a"
    for record in RECORDS.values():
        rows = {row["label"]: row for row in record["rows"]}
        assert not any(row["violations"] for row in rows.values() if row["budgeted"])
        printed = {line.split(" | ")[0].removeprefix("| "): line for line in study_table.lines({"stdlib": record})}
        assert all(("†" in printed[label]) is not row["budgeted"] for label, row in rows.items())
