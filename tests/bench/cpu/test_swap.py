"""The benchmarks that are one file, on models of a hundred thousand weights."""

from __future__ import annotations

import json
from pathlib import Path

from bench import cohort, swap


def test_it_compares_every_way_and_shows_what_a_quarter_saves(tmp_path: Path) -> None:
    swap.main(["--small", "--repeats", "2", "--out", str(tmp_path / "swap.json")])
    report = json.loads((tmp_path / "swap.json").read_text())
    assert set(report["step"]["median_ms"]) == {"fedmoe", "eager", "grouped_mm", "batched_mm"}
    whole, masked, cut = (report["bytes"][name] for name in ("all experts", "a quarter, masked", "a quarter, cut out"))
    assert masked["weights"] == whole["weights"] > cut["weights"]
    assert whole["optimizer"] > 1.9 * whole["weights"], "AdamW keeps two numbers for each weight"
    assert cut["gradients"] < whole["gradients"]
    assert cut["peak above weights and optimizer"] < masked["peak above weights and optimizer"]


def test_it_compares_clients_together_with_clients_one_by_one(tmp_path: Path) -> None:
    out = tmp_path / "cohort.json"
    cohort.main(["--small", "--clients", "3", "--tokens", "16", "--repeats", "2", "--out", str(out)])
    (row,) = json.loads(out.read_text())["rows"]
    assert set(row["client_rounds_per_s"]) == {"one by one", "together"}
    assert row["largest_relative_difference"] < cohort.CLOSE
    assert row["peak_bytes"] <= row["predicted_bytes"] <= 1.10 * row["peak_bytes"]
