"""The benchmark of the noise, on a few numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bench import noise


def test_it_times_every_source(tmp_path: Path) -> None:
    noise.main(["--small", "--repeats", "2", "--out", str(tmp_path / "new" / "noise.json")])
    report = json.loads((tmp_path / "new" / "noise.json").read_text())
    assert set(report["seconds"]) == {"seed", "secret", "float64"}
    assert all(len(spent) == 2 and min(spent) > 0 for spent in report["seconds"].values())
    assert all(rate > 0 for rate in report["numbers_a_second"].values())


def test_it_reports_no_time_of_numbers_that_are_not_the_gaussians(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "discrete_gaussian", lambda sigma, size, draws: np.full(size, sigma))
    with pytest.raises(SystemExit, match="the numbers of seed have another variance; no time is worth reporting"):
        noise.seconds(1000, 1)
