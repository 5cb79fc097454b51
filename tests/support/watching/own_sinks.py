"""Sinks of a package that is not ours, good and bad ones, and runs that are watched by them."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import TINY

from fedmoe_core.config.run_config import Config
from fedmoe_core.simulation import run as simulate
from fedmoe_core.simulation.observer import NullObserver
from fedmoe_core.simulation.sinks.sink import Sink

NAMES = ("Recorder", "Forgetful", "RaisesAtStart", "RaisesInRounds", "RaisesAtEnd", "Hangs", "CannotBeMade")


class Recorder(Sink):
    """Writes down, beside the run, what it is told and on which thread."""

    def _tell(self, *what: Any) -> None:
        with (Path(self.config.out) / "told.jsonl").open("a") as file:
            file.write(json.dumps([*what, threading.current_thread().name]) + "\n")

    def on_start(self, info: Mapping[str, Any]) -> None:
        self._tell("start", info["run"], info["resumed"], info["first_round"])

    def on_round(self, round: int, rounds: int, record: Mapping[str, Any]) -> None:
        self._tell("round", round, record["loss"])

    def on_end(self, summary: Mapping[str, Any]) -> None:
        self._tell("end", summary["model_hash"])

    def close(self) -> None:
        self._tell("close")


class Forgetful(Recorder):
    """Has lost all but the first round's line."""

    def last_told(self, first_round: int) -> int:
        return 0


class RaisesAtStart(Sink):
    def on_start(self, info: Mapping[str, Any]) -> None:
        raise ConnectionError("no such\nserver")


class RaisesInRounds(Sink):
    def on_round(self, round: int, rounds: int, record: Mapping[str, Any]) -> None:
        raise OSError(28, "No space left on device")


class RaisesAtEnd(Sink):
    def close(self) -> None:
        raise RuntimeError("the end")


class Hangs(Sink):
    def on_round(self, round: int, rounds: int, record: Mapping[str, Any]) -> None:
        threading.Event().wait()


class CannotBeMade(Sink):
    def __init__(self, config: Config) -> None:
        raise TypeError("wrong version")


def install(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``site`` be a folder of the path with a package that names the sinks above, and one that does not load."""
    facts = site / "own_sinks-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: own-sinks\nVersion: 1.0\n")
    names = [f"{name.lower()} = own_sinks:{name}" for name in NAMES]
    (facts / "entry_points.txt").write_text("\n".join(["[fedmoe.sinks]", *names, "absent = no_such_module:X", ""]))
    monkeypatch.syspath_prepend(site)


class StopsAfter(NullObserver):
    """Ends a run as Ctrl-C would, once a round is on record and told."""

    def __init__(self, round: int) -> None:
        self.round = round

    def on_client(self, round: int, client: int, record: Mapping[str, Any]) -> None:
        if round > self.round:
            raise KeyboardInterrupt


def watched(notes: Path, out: Path, sinks: str, *words: str) -> Config:
    """A tiny run of three rounds with these sinks; its warm-up is cached beside the corpus."""
    where = (f"data=jsonl:{notes}", f"out={out}", f"cache={notes.parent / 'cache'}")
    return Config.load(overrides=[*TINY, "rounds=3", *where, f"watch.sinks={sinks}", *words])


def stopped_and_resumed(config: Config, *, after: int) -> dict[str, Any]:
    """Play a run to a round, stop it there, and go on to its end; the summary."""
    with pytest.raises(KeyboardInterrupt):
        simulate.run(config, observer=StopsAfter(after))
    return simulate.resume(Path(config.out), observer=NullObserver())
