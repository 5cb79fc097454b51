"""How a run stands, as one record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from fedmoe_core.simulation.directory.refusals import Refusals

State = Literal["not begun", "preparing", "running", "stopped", "finished"]


@dataclass(frozen=True)
class TierSeen:
    """The clients of one budget: how many, what they answered, how they are judged, what they used of it at most.

    ``part`` is the largest used part of a limit so far, and ``of`` the word of that resource; 0 without any limit.
    """

    tier: str
    clients: int
    answers: int = 0
    accepted: int = 0
    loss: float | None = None
    worst_loss: float | None = None
    part: float = 0.0
    of: str = ""


@dataclass(frozen=True)
class Seen:
    """How a run stands.

    Attributes:
        path: its directory.
        state: not begun (nothing there), preparing (before its first line), running, stopped (unfinished, and no
            process has it) or finished.
        title: system, model and data; empty before it has begun.
        round, rounds: the last one on record, -1 = none, and how many there will be, 0 = not known.
        loss_R, accuracy_R: of the rounds that were evaluated, oldest first.
        worst_loss: of the client that is worst off, when last evaluated.
        answers: client updates by status; "ok" entered a sum.
        reasons: by status the updates that did not count, grouped by reason.
        tiers: the clients by budget.
        bytes_down, bytes_up, virtual_seconds: so far; None = not known.
        memory_bytes: largest measured peak of a client.
        coverage: share of the experts that the last round trained.
        round_seconds: mean of the last rounds.
        seconds_left: guess from it; None where the run does not go on.
        silent_seconds: since the last line.
        resumable: whether there is a checkpoint to go on from.
        problems: sentences: what makes a finished run a failed one, lines that cannot be read.
    """

    path: str
    state: State
    title: str = ""
    round: int = -1
    rounds: int = 0
    loss_R: tuple[float, ...] = ()
    accuracy_R: tuple[float, ...] = ()
    worst_loss: float | None = None
    answers: Mapping[str, int] = field(default_factory=dict)
    reasons: Mapping[str, tuple[Refusals, ...]] = field(default_factory=dict)
    tiers: tuple[TierSeen, ...] = ()
    bytes_down: float | None = None
    bytes_up: float | None = None
    virtual_seconds: float | None = None
    memory_bytes: float | None = None
    coverage: float | None = None
    round_seconds: float | None = None
    seconds_left: float | None = None
    silent_seconds: float | None = None
    resumable: bool = False
    problems: tuple[str, ...] = ()
