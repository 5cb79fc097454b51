"""The benchmark beside other simulators: both engines at hand give the same losses, and a row for each is kept."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from bench.fedavg import run


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_fedmoe_and_the_bare_loop_come_to_the_same_losses(tmp_path: Path) -> None:
    chosen = ["--jobs", "small", "--ranks", "2", "--rounds", "3", "--repeats", "1", "--port", free_port()]
    run.main([*chosen, "--out", str(tmp_path / "fedavg.json")])
    report = json.loads((tmp_path / "fedavg.json").read_text())
    bare, own = report["rows"]
    assert [bare["engine"], own["engine"]] == ["bare loop", "fedmoe"]
    assert bare["first_losses"] == own["first_losses"]
    assert bare["first_losses"][0] > bare["first_losses"][-1]
    assert bare["times_the_bare_loop"] == 1
    assert min(bare["round_seconds"], own["round_seconds"], own["first_round_after_s"]) > 0
    assert min(bare["pss_bytes"], own["pss_bytes"]) > 1e8  # two processes with torch
    assert report["peers"] == {}


def test_an_engine_with_other_losses_has_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def played(engine: str, *_: object) -> run.Outcome:
        losses = [1.0, 0.5, 0.25 + 1e-4 * (engine == "fedmoe")]
        return run.Outcome(losses, [0.0] * 3, [1.0] * 3, 1.0, 1)

    monkeypatch.setattr(run, "play", played)
    with pytest.raises(SystemExit, match=r"fedmoe is 1\.0e-04 from the bare loop on small"):
        run.main(["--jobs", "small", "--repeats", "1"])
