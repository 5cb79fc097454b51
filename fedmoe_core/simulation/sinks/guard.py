"""Sinks beside the screen: each works on a thread of its own; one that raises or hangs is off, and the run goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

from fedmoe_core.base.files import read_json_lines
from fedmoe_core.base.say import say
from fedmoe_core.simulation.observer import Observer
from fedmoe_core.simulation.sinks.sink import Sink

WAITING = 1000  # rounds that may wait for a slow sink; of 1,000 clients each takes 40 KB
PATIENCE = 30.0  # seconds after the last round in which sinks may finish
HURRY = 5.0  # the same where the run ended early


class Guarded(Observer):
    """One sink on a thread of its own: the run hands over what happened and never waits, until it closes."""

    def __init__(self, name: str, sink: Sink) -> None:
        self._name, self._sink = name, sink
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()  # None: there are no more
        self._off = Event()
        self._thread = Thread(target=self._work, name=f"sink {name}", daemon=True)

    def on_start(self, info: Mapping[str, Any]) -> None:
        self._thread.start()
        self._hand_over(partial(self._start, dict(info)))

    def on_round(self, round: int, rounds: int, record: Mapping[str, Any]) -> None:
        self._hand_over(partial(self._sink.on_round, round, rounds, record))

    def on_end(self, summary: Mapping[str, Any]) -> None:
        self._hand_over(partial(self._sink.on_end, summary))

    def ask_to_close(self) -> None:
        """Let the thread close the sink once it has told all; does not wait."""
        self._calls.put(None)

    def wait(self, until: float) -> None:
        """Wait for the thread, to a time of ``time.monotonic``; say so where it is not done by then."""
        if self._thread.ident is not None:
            self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive() and not self._off.is_set():
            self._switch_off("was not done when the run ended, so what it has may be incomplete")

    def _start(self, info: Mapping[str, Any]) -> None:
        """Open the sink, and tell it of the rounds of a resumed run that it lacks."""
        self._sink.on_start(info)
        first = int(info["first_round"])
        if not info.get("resumed") or (told := self._sink.last_told(first)) >= first:
            return
        for _, line in read_json_lines(Path(self._sink.config.out) / "metrics.jsonl"):
            if line["type"] == "round" and told < line["round"] <= first:
                self._sink.on_round(line["round"], int(info["rounds"]), line)

    def _hand_over(self, call: Callable[[], None]) -> None:
        if self._calls.qsize() >= WAITING:
            self._switch_off(f"is {WAITING} rounds behind and is off for the rest of this run")
        if not self._off.is_set():
            self._calls.put(call)

    def _work(self) -> None:
        """Make the calls in their order; the first that raises is the last, but for closing."""
        try:
            while (call := self._calls.get()) is not None and not self._off.is_set():
                call()
        except Exception as error:
            self._fail(error)
        try:
            self._sink.close()
        except Exception as error:
            if not self._off.is_set():
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        words = " ".join(f"{type(error).__name__}: {error}".split())
        self._switch_off(f"failed ({words:.300}) and is off for the rest of this run")

    def _switch_off(self, what: str) -> None:
        if not self._off.is_set():
            self._off.set()
            say(f"warning: watch.sinks={self._name} {what}", err=True)


class Watched(Observer):
    """The screen's observer and the sinks beside it: the sinks are told of start, rounds and end, the screen of all."""

    def __init__(self, screen: Observer, sinks: Mapping[str, Sink]) -> None:
        self._screen = screen
        self._sinks = [Guarded(name, sink) for name, sink in sinks.items()]

    def on_start(self, info: Mapping[str, Any]) -> None:
        self._screen.on_start(info)
        for sink in self._sinks:
            sink.on_start(info)

    def on_stage(self, text: str) -> None:
        self._screen.on_stage(text)

    def on_progress(self, stage: str, done: int, total: int) -> None:
        self._screen.on_progress(stage, done, total)

    def on_client(self, round: int, client: int, record: Mapping[str, Any]) -> None:
        self._screen.on_client(round, client, record)

    def on_round(self, round: int, rounds: int, record: Mapping[str, Any]) -> None:
        self._screen.on_round(round, rounds, record)
        for sink in self._sinks:
            sink.on_round(round, rounds, record)

    def on_end(self, summary: Mapping[str, Any]) -> None:
        self._screen.on_end(summary)
        for sink in self._sinks:
            sink.on_end(summary)

    def finish(self, patience: float) -> None:
        """Let the sinks close, all at once, for ``patience`` seconds at most; the screen's observer stays open."""
        for sink in self._sinks:
            sink.ask_to_close()
        until = time.monotonic() + patience
        for sink in self._sinks:
            sink.wait(until)
