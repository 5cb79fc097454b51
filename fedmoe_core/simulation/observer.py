"""Who is told how a run goes: the Observer protocol, silence, and the rows of a dry run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class PlanRow:
    """What one client would hold and spend in its first round; a budget of None means no limit.

    Attributes:
        client: name of the client.
        tier: name of its budget tier.
        experts_held: experts held in each MoE layer, in depth order.
        experts, trainable: experts held and experts trained, over all layers.
        memory_bytes, flops, bytes_down, bytes_up: predicted cost, in the units of ``Budget``.
        local_steps, top_k: the work that is left inside the FLOP budget.
        samples: private training rows of the client.
        fits: whether the plan is inside every limit; if not, ``reason`` is one sentence with the number that would do.
    """

    client: str
    tier: str
    experts_held: tuple[int, ...]
    experts: int
    trainable: int
    memory_bytes: int
    memory_budget: int | None
    flops: float
    flops_budget: float | None
    bytes_down: int
    bytes_down_budget: int | None
    bytes_up: int
    bytes_up_budget: int | None
    local_steps: int
    top_k: int
    samples: int
    fits: bool = True
    reason: str = ""


class Observer(Protocol):
    """Called by the simulator on rank 0; an observer never changes a run."""

    def on_start(self, info: Mapping[str, Any]) -> None:
        """Report the facts of the run: label, algorithm, model, data, rounds, clients_per_round, first_round, out."""
        ...

    def on_stage(self, text: str) -> None:
        """Report that a stage outside the rounds begins, such as the warm-up."""
        ...

    def on_progress(self, stage: str, done: int, total: int) -> None:
        """Report that ``done`` of ``total`` steps of a stage are over."""
        ...

    def on_client(self, round: int, client: int, record: Mapping[str, Any]) -> None:
        """Report that a client of round ``round`` (from 1) answered; ``record`` is its line of metrics.jsonl."""
        ...

    def on_round(self, round: int, rounds: int, record: Mapping[str, Any]) -> None:
        """Report that round ``round`` of ``rounds`` is over (0 = before training), with its line of metrics.jsonl."""
        ...

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """Report that the run is over; ``summary`` is what summary.json holds."""
        ...


class NullObserver:
    """An observer that says nothing."""

    def on_start(self, info: Mapping[str, Any]) -> None: ...
    def on_stage(self, text: str) -> None: ...
    def on_progress(self, stage: str, done: int, total: int) -> None: ...
    def on_client(self, round: int, client: int, record: Mapping[str, Any]) -> None: ...
    def on_round(self, round: int, rounds: int, record: Mapping[str, Any]) -> None: ...
    def on_end(self, summary: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...
