"""The benchmark of many clients and ranks, on a few of each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import scale


def test_it_runs_clients_ranks_and_one_long_run_and_keeps_what_they_cost(tmp_path: Path) -> None:
    chosen = ["--small", "--clients", "4", "--ranks", "2", "--long", "6", "2", "4"]
    scale.main([*chosen, "--out", str(tmp_path / "scale.json")])
    report = json.loads((tmp_path / "scale.json").read_text())
    (few,), (ranks,), long = report["clients"], report["ranks"], report["long"]
    assert (few["clients"], few["rounds"], few["client_rounds"]) == (4, scale.ROUNDS, 4 * scale.ROUNDS)
    assert (ranks["ranks"], ranks["clients"]) == (2, 100)
    assert (long["rounds"], long["client_rounds"], long["refused"]) == (2, 8, 0)
    for row in (few, ranks, long):
        assert 0 < row["engine_seconds"] < row["round_seconds"] < row["wall_seconds"]
        assert row["peak_rss_bytes"] > 1e8  # torch alone is more
        assert row["report_bytes"] > 1000


def test_a_run_that_fails_has_no_row(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="3 clients ended with 2"):
        scale.run(3, tmp_path, "rounds=0", small=True, cores=1)
