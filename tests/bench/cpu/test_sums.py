"""The benchmark of the exact sums, on a few numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from sums_restated import add_whole

from bench import sums


def test_it_times_every_way_on_one_and_two_threads(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    sums.main(["--small", "--repeats", "2", "--out", str(tmp_path / "sums.json")])
    report = json.loads((tmp_path / "sums.json").read_text())
    assert [(row["case"], row["threads"]) for row in report["rows"]] == [
        (c.name, n) for c in sums.TRIAL for n in (1, 2)
    ]
    ways = {"check, before", "check", "add, before", "add", "whole", "float32 add_", "float64 add_"}
    assert all(set(row["median_ms"]) == ways and min(row["median_ms"].values()) > 0 for row in report["rows"])
    assert torch.get_num_threads() == threads
    assert len(report["machine"]["commit"]) >= 7


def test_its_formula_before_is_the_formula() -> None:
    delta, total = torch.randn(3, 5), torch.zeros(4, 5, dtype=torch.int64)
    want = total.clone()
    add_whole(want, delta, [7, 7, 7], [2, 0, 3], sums.SETTINGS.scale_bits)
    sums.add_before(total, delta, 7, [2, 0, 3])
    assert torch.equal(total, want)


def test_it_reports_no_time_of_sums_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "add_before", lambda total, *_: total.add_(1))
    with pytest.raises(SystemExit, match="differ; no time is worth reporting"):
        sums.contenders(sums.TRIAL[0])


def test_the_cases_have_as_many_values_as_they_say() -> None:
    for case in (*sums.CASES, *sums.TRIAL):
        values = sum(delta.numel() for delta in case.deltas())
        assert case.name.endswith(f" {values:,}")
