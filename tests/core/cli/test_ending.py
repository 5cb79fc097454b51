"""How a command ends when a signal comes while an error is already on its way out."""

from __future__ import annotations

import signal
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
from typer.testing import CliRunner

from fedmoe_core.cli import main

COMMANDS = {
    "simulate": ["nonsense=1"],
    "resume": ["{}/none"],
    "plan": ["nonsense=1"],
    "score": ["nonsense=1"],
    "watch": ["--once", __file__],
    "report": ["{}/none"],
    "compare": ["nonsense=1"],
    "split": ["{}/none", "{}/out", "--layers", "first:1"],
    "export": ["{}/none", "{}/out"],
}


class Late:
    """Stands where ``errors`` does; a signal interrupts its first line, which is that of Python's contextlib."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.met: BaseException | None = None

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert error is not None, "these words are wrong"
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
        raise KeyboardInterrupt


def test_all_commands_are_tried() -> None:
    names = {str(command.callback.__name__) for command in main.app.registered_commands if command.callback}
    assert names == {*COMMANDS, "systems"}  # the last takes no words that could be wrong


@pytest.mark.parametrize("name", COMMANDS)
def test_an_interruption_on_the_way_out_of_an_error_is_told(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks whose peer was killed sometimes ended with 130 and not a word, under a launcher that sends SIGTERM."""
    monkeypatch.setattr(main, "errors", Late)
    words = [word.format(tmp_path) for word in COMMANDS[name]]
    result = CliRunner().invoke(main.app, [name, *words])
    assert result.exit_code == 130, result.output
    assert result.stderr.startswith("stopped"), result.output
    assert signal.getsignal(signal.SIGTERM) is not signal.default_int_handler
