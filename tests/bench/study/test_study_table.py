"""The tables in docs/results.md and docs/study.md are what their command prints from the committed records."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.study import table as study_table

ROOT = Path(__file__).resolve().parents[3]
RECORDED = sorted(path.parent.name for path in study_table.RESULTS.glob("*/compare.json"))
ABLATIONS = [name for name in RECORDED if name.startswith("ablation-")]
RECORDS = {name: study_table.read(name) for name in study_table.STUDIES if name in RECORDED}


def test_the_results_show_the_table_as_it_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert RECORDS
    study_table.main([])
    assert capsys.readouterr().out in (ROOT / "docs" / "results.md").read_text("utf-8")


@pytest.mark.parametrize("name", ABLATIONS)
def test_the_study_shows_every_ablation_as_it_is_printed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    study_table.main([name])
    assert capsys.readouterr().out in (ROOT / "docs" / "study.md").read_text("utf-8")


def test_an_ablation_has_a_line_for_each_variant_and_its_tiers() -> None:
    record = RECORDS["stdlib"]
    table = study_table.departures(record)
    assert len(table) == 2 + len(record["rows"])
    tiers = [name for name in record["rows"][0]["qualities"] if name.startswith("mean ")]
    assert [head.strip() for head in table[0].split("|")[2:-1]] == ["global", "clients", *(t[5:] for t in tiers)]
    for row, line in zip(record["rows"], table[2:], strict=True):
        cells = [text.strip() for text in line.split("|")[1:-1]]
        assert cells[0] == (row["label"] if row["budgeted"] else f"{row['label']} †")
        assert cells[3:] == [study_table.cell(row["qualities"][tier], accuracy=False) for tier in tiers]


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
