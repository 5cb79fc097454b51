"""Ways of launching a contender's step, timed: cold with the host ahead, back to back, and captured as a graph."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.common import machine
from bench.common.cases import Problem
from bench.common.clock import Clock
from bench.common.peers import Bound, Contender, forget

PASSES = ("fwd", "bwd", "fwd+bwd")
MARKS = {"fwd": (0, 1), "bwd": (1, 2), "fwd+bwd": (0, 2)}  # of the three marks of a step, the first and the last
BATCH = 10  # steps between two marks under a sustained load


class Seat(NamedTuple):
    """A contender that takes part, with its leaves for every set of tokens, and what was found on the way.

    Attributes:
        errors: on the first set of tokens, by tensor.
        power: clocks and power under a sustained load, at most one reading.
        first: seconds of the first step, compilation and tuning included, at most one.
    """

    contender: Contender
    bound: Bound
    tasks: list[Problem]
    leaves: list[tuple[Tensor, Tensor]]
    errors: dict[str, float]
    power: list[str | None]
    first: list[float]

    @property
    def passes(self) -> tuple[str, ...]:
        """What it can be timed by."""
        return PASSES if self.contender.backward else PASSES[:1]

    def forget(self) -> None:
        for pair in self.leaves:
            forget(self.bound, *pair)

    def forward(self, turn: int) -> Any:
        at = turn % len(self.tasks)
        return self.bound.forward(self.tasks[at], *self.leaves[at])

    def backward(self, y: Any, turn: int) -> None:
        if not self.contender.backward:
            return
        self.bound.backward(y, self.tasks[turn % len(self.tasks)].dy_TH)


class Turn(NamedTuple):
    """A contender of `in_turn`: what comes before its time is taken, and what it does, which calls `mark` at each end
    of what is timed; both get the number of the round."""

    before: Callable[[int], object]
    run: Callable[[int, Callable[[], None]], object]


Times = dict[tuple[str, str], list[float]]


def in_turn(
    contenders: Mapping[str, Turn], device: str, rounds: tuple[int, int], spans: Mapping[str, tuple[int, int]]
) -> tuple[Times, Times]:
    """Time contenders cold, with the host ahead; the one that starts a round starts the next one last.

    Args:
        contenders: by name.
        device: "cuda" or "cpu".
        rounds: the untimed and the timed ones.
        spans: by name, the marks between which a time is taken.

    Returns:
        Milliseconds of the device and of the host by contender and span; while the host's are below the clock's lead
        they do not show in the device's.
    """
    times, host = ({(name, span): [] for name in contenders for span in spans} for _ in range(2))
    clock, names = Clock(device), list(contenders)
    marks: list[tuple[Any, float]] = []

    def mark() -> None:
        marks.append((clock.mark(), time.perf_counter()))

    for turn in range(sum(rounds)):
        first = turn % len(names) if names else 0
        for name in (*names[first:], *names[:first]):
            contenders[name].before(turn)
            marks.clear()
            clock.start()
            contenders[name].run(turn, mark)
            for span, (a, b) in spans.items() if turn >= rounds[0] else ():
                (begun, wall), (ended, later) = marks[a], marks[b]
                times[name, span].append(clock.milliseconds(begun, ended))
                host[name, span].append(1e3 * (later - wall))
    return times, host


def eager(seats: Sequence[Seat], device: str, rounds: tuple[int, int]) -> tuple[Times, Times]:
    """Time every pass of every contender as `in_turn` does; passes that a contender lacks mean nothing."""

    def turn_of(seat: Seat) -> Turn:
        def run(turn: int, mark: Callable[[], None]) -> None:
            mark()
            y = seat.forward(turn)
            mark()
            seat.backward(y, turn)
            mark()

        return Turn(lambda _: seat.forget(), run)

    found = in_turn({seat.contender.name: turn_of(seat) for seat in seats}, device, rounds, MARKS)
    for seat in seats:
        seat.forget()
    return found


def sustained(seat: Seat, device: str, seconds: float) -> list[float]:
    """Time steps back to back, nothing emptied and nothing waited for: milliseconds of a step, by batches of ten."""
    clock, found = Clock(device), []
    reader = threading.Thread(target=lambda: seat.power.append(machine.clocks()))
    began = time.perf_counter()
    while not found or time.perf_counter() < began + seconds:
        first = clock.mark()
        for turn in range(BATCH):
            seat.forget()
            seat.backward(seat.forward(turn), turn)
        found.append(clock.milliseconds(first, clock.mark()) / BATCH)
        if reader.ident is None and time.perf_counter() > began + seconds / 2:
            reader.start()  # beside the next batches, so that the load is on
    if reader.ident is not None:
        reader.join()
    seat.forget()
    return found[1:] or found  # the first batch comes from idle clocks


def capture(run: Callable[[], Any], forget: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Capture a graph of `run`, warmed up on a separate stream, as needed; its gradients stay in the graph's pool."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            forget()
            run()
    torch.cuda.current_stream().wait_stream(stream)
    forget()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph
