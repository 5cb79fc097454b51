"""Who is told how a run goes: the Observer, silence, and the rows of a dry run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedmoe_core.budget.limits import Budget, Cost
from fedmoe_core.budget.rates import Seconds
from fedmoe_core.budget.resources import RESOURCES


@dataclass(frozen=True)
class GroupRow:
    """Clients that would train at once in the first round, or one that trains alone though cohorts are asked for.

    Attributes:
        clients: their names, by ascending client.
        predicted_bytes: the peak of the process while they train.
        alone: why it trains alone; empty for a cohort.
    """

    clients: tuple[str, ...]
    predicted_bytes: int
    alone: str = ""


@dataclass(frozen=True)
class PlanRow:
    """What one client would hold and spend in its first round, beside what its device can bear.

    Attributes:
        client: name of the client.
        experts_held: experts held in each MoE layer, in depth order.
        trainable: experts trained, over all layers.
        predicted: what the plan will cost.
        budget: the device's own, which FedAvg's plan may pass; its name is the tier.
        local_steps, top_k: the work that is left inside the budget.
        samples: private training rows of the client.
        deadline: ``time.deadline``; 0 = none.
        group: with whom it trains in the first round; None where it is not drawn, or no cohorts are asked for.
    """

    client: str
    experts_held: tuple[int, ...]
    trainable: int
    predicted: Cost
    budget: Budget
    local_steps: int
    top_k: int
    samples: int
    deadline: float = 0.0
    group: GroupRow | None = None

    @property
    def tier(self) -> str:
        """The client's budget as it was written."""
        return self.budget.name

    @property
    def experts(self) -> int:
        """Experts held over all layers."""
        return sum(self.experts_held)

    @property
    def fits(self) -> bool:
        """Whether the plan is inside every limit."""
        return self.budget.fits(self.predicted)

    @property
    def reason(self) -> str:
        """What passes which limit; empty where the plan fits."""
        return "; ".join(self.budget.violations(self.predicted))

    @property
    def seconds(self) -> Seconds | None:
        """Virtual seconds of the round, without straggling; None where the tier states no speed."""
        return None if self.budget.pace is None else self.budget.pace.seconds(self.predicted)

    @property
    def late(self) -> bool:
        """Whether its update would come after the deadline and not count."""
        return bool(self.deadline) and RESOURCES["time"].used(self.predicted, self.budget) > self.deadline

    def facts(self) -> dict[str, Any]:
        """Return the row in JSON's types: of every resource what is used (None = not known) and allowed (no limit)."""
        used = {
            word: resource.used(self.predicted, self.budget) if resource.known(self.budget) else None
            for word, resource in RESOURCES.items()
        }
        return {
            "client": self.client,
            "tier": self.tier,
            "experts_held": list(self.experts_held),
            "experts": self.experts,
            "trainable": self.trainable,
            "used": used,
            "allowed": {word: self.budget.limit(word) for word in RESOURCES},
            "seconds": None if self.seconds is None else self.seconds._asdict(),
            "local_steps": self.local_steps,
            "top_k": self.top_k,
            "samples": self.samples,
            "fits": self.fits,
            "late": self.late,
            "reason": self.reason,
        }


def groups_of(rows: Sequence[PlanRow]) -> list[GroupRow]:
    """Return the groups of the first round, each once; none where no cohorts are asked for."""
    return list(dict.fromkeys(row.group for row in rows if row.group is not None))


class Observer:
    """Called by the simulator on rank 0; an observer never changes a run. What a class leaves out says nothing."""

    def on_start(self, info: Mapping[str, Any]) -> None:
        """Report the facts of the run: label, algorithm, model, data, rounds, clients_per_round, first_round, out.

        Of a buffered run, clients_per_round are the answers of a server step, and in_flight says how many train.
        """

    def on_stage(self, text: str) -> None:
        """Report that a stage outside the rounds begins, such as the warm-up."""

    def on_progress(self, stage: str, done: int, total: int) -> None:
        """Report that ``done`` of ``total`` steps of a stage are over."""

    def on_client(self, round: int, client: int, record: Mapping[str, Any]) -> None:
        """Report that a client of round ``round`` (from 1) answered; ``record`` is its line of metrics.jsonl."""

    def on_round(self, round: int, rounds: int, record: Mapping[str, Any]) -> None:
        """Report that round ``round`` of ``rounds`` is over (0 = before training), with its line of metrics.jsonl."""

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """Report that the run is over; ``summary`` is what summary.json holds."""

    def close(self) -> None:
        """Leave the screen, whatever happened; safe to call twice."""


class NullObserver(Observer):
    """An observer that says nothing."""
