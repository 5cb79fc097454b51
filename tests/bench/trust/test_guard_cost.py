"""The command that measures the guard's rules, on a few numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest

from bench.trust.guard import main
from fedmoe_core.server.guard.settings import Rule


def test_every_rule_is_measured_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--small", "--clients", "5", "6", "--repeats", "1", "--out", str(tmp_path / "new" / "guard.json")])
    rows = json.loads((tmp_path / "new" / "guard.json").read_text())["rows"]
    assert [(row["clients"], row["rule"]) for row in rows] == [(n, rule) for n in (5, 6) for rule in get_args(Rule)]
    assert all(row["median_s"] > 0 for row in rows)
    assert "320 numbers each" in capsys.readouterr().out
