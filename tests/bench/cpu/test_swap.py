"""The benchmark of the swap, on a model of a hundred thousand weights."""

from __future__ import annotations

import json
from pathlib import Path

from bench import swap


def test_it_compares_every_way_and_shows_what_a_quarter_saves(tmp_path: Path) -> None:
    swap.main(["--small", "--repeats", "2", "--out", str(tmp_path / "swap.json")])
    report = json.loads((tmp_path / "swap.json").read_text())
    assert set(report["step"]["median_ms"]) == {"fedmoe", "eager", "grouped_mm", "batched_mm"}
    whole, masked, cut = (report["bytes"][name] for name in ("all experts", "a quarter, masked", "a quarter, cut out"))
    assert masked["weights"] == whole["weights"] > cut["weights"]
    assert whole["optimizer"] > 1.9 * whole["weights"], "AdamW keeps two numbers for each weight"
    assert cut["gradients"] < whole["gradients"]
    assert cut["peak above weights and optimizer"] < masked["peak above weights and optimizer"]
