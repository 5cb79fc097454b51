"""Commands of Flower's are started with its own network calls off, unless their user says otherwise."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from fedmoe_bindings.flower.__main__ import SWITCHES, main, quiet


def test_what_the_user_says_stands() -> None:
    assert quiet({}) == SWITCHES
    assert quiet({"FLWR_TELEMETRY_ENABLED": "1", "HOME": "/x"}) == {
        **SWITCHES,
        "FLWR_TELEMETRY_ENABLED": "1",
        "HOME": "/x",
    }


def test_inv12_the_command_runs_with_the_switches_and_finds_its_like(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    monkeypatch.setattr(os, "execve", lambda *words: started.append(words))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    (tmp_path / "flwr").touch()
    main(["flwr", "run", "."])
    path, words, environment = started[0]
    assert (path, words) == (str(tmp_path / "flwr"), ["flwr", "run", "."])
    assert environment["FLWR_TELEMETRY_ENABLED"] == "0"
    assert environment["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert environment["PATH"].split(os.pathsep)[0] == str(tmp_path)


def test_another_command_and_a_missing_flower_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="flwr, flower-superlink, flower-supernode"):
        main(["rm", "-rf", "/"])
    with pytest.raises(SystemExit, match=r"pip install 'fedmoe-core\[flower\]'"):
        main(["flower-supernode"])
