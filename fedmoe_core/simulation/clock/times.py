"""Virtual seconds of clients and rounds: the pace of a device, times a straggling that is drawn in each round."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedmoe_core.base import show
from fedmoe_core.base.rng import counter_rng
from fedmoe_core.budget.limits import Cost
from fedmoe_core.budget.resources import RESOURCES
from fedmoe_core.messages.update import ClientUpdate
from fedmoe_core.server.state import Population
from fedmoe_core.simulation.clock.arrivals import Flight


@dataclass(frozen=True)
class ClientTime:
    """The virtual time of one client's round.

    Attributes:
        straggle: how many times as long as its pace says; 1 without straggling.
        seconds: what it took, straggling included.
    """

    straggle: float
    seconds: float


@dataclass(frozen=True)
class RoundTime:
    """The virtual time of one round.

    Attributes:
        seconds: until the slowest client answered, or until the deadline where one came late; of a buffered run, since
            the server step before.
        clients: each client's own, by client.
        flights: of a buffered run, when each left and arrived, by client; else empty.
        staleness: of a buffered run, server steps between the model that each took along and this step, by client.
        in_flight: of a buffered run, clients still in flight at the end.
    """

    seconds: float
    clients: Mapping[int, ClientTime]
    flights: Mapping[int, Flight] = field(default_factory=dict)
    staleness: Mapping[int, int] = field(default_factory=dict)
    in_flight: int = 0


def has_clock(population: Population) -> bool:
    """Tell whether the run has a virtual clock: the budget of every client says how fast it is."""
    return all(budget.pace is not None for budget in population.budgets)


def straggling(population: Population, round: int, client: int) -> float:
    """Draw how many times as long as planned a client takes: log-normal with median 1, alike on every rank."""
    sigma = population.config.time.straggle
    if not sigma:
        return 1.0
    return math.exp(sigma * float(counter_rng(population.config.seed, "straggle", round, client).standard_normal()))


def client_time(population: Population, client: int, round: int, cost: Cost) -> ClientTime:
    """Return the virtual time of a client that spent ``cost`` in the round of that index."""
    straggle = straggling(population, round, client)
    return ClientTime(straggle, straggle * RESOURCES["time"].used(cost, population.budgets[client]))


def lateness(population: Population, update: ClientUpdate) -> str:
    """Say how late an update comes after ``time.deadline``; empty where it is in time, or there is no deadline."""
    deadline = population.config.time.deadline
    if not deadline:
        return ""
    took = client_time(population, update.client, update.round, update.cost).seconds
    if took <= deadline:
        return ""
    return f"came after {show.seconds(took)}, and the round ended after {show.seconds(deadline)}"


def round_time(population: Population, updates: Sequence[ClientUpdate]) -> RoundTime | None:
    """Return the virtual time of a round with these answers; None where the run has no clock."""
    if not has_clock(population):
        return None
    took = _each(population, updates)
    longest = max((time.seconds for time in took.values()), default=0.0)
    return RoundTime(min(longest, population.config.time.deadline or math.inf), took)


def step_time(
    population: Population,
    updates: Sequence[ClientUpdate],
    arrived: Sequence[Flight],
    *,
    step: int,
    since: float,
    in_flight: int,
) -> RoundTime:
    """Return the virtual time of a server step of a buffered run.

    Args:
        population: with the paces.
        updates: of those who arrived.
        arrived: their flights, in the order of arrival.
        step: server steps before this one.
        since: virtual seconds of the run at the step before.
        in_flight: clients still in flight.
    """
    flights = {flight.client: flight for flight in arrived}
    staleness = {flight.client: step - flight.version for flight in arrived}
    return RoundTime(arrived[-1].arrives - since, _each(population, updates), flights, staleness, in_flight)


def _each(population: Population, updates: Sequence[ClientUpdate]) -> dict[int, ClientTime]:
    return {u.client: client_time(population, u.client, u.round, u.cost) for u in updates}


def time_facts(time: RoundTime | None, updates: Sequence[ClientUpdate]) -> dict[str, Any]:
    """Return what a round's line tells of its time: how long it took, who came late, how stale the answers were."""
    if time is None:
        return {}
    late = [{"client": u.client, "seconds": time.clients[u.client].seconds} for u in updates if u.status == "late"]
    found = {"virtual_seconds": time.seconds, **({"late": late} if late else {})}
    if stale := list(time.staleness.values()):
        found |= {"staleness_mean": sum(stale) / len(stale), "staleness_max": max(stale), "in_flight": time.in_flight}
    return found


def time_summary(population: Population, names: Sequence[str], rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what a run's summary tells of its time; nothing where it has no clock.

    Args:
        population: with the deadline and the target.
        names: of the clients.
        rounds: lines of metrics.jsonl, round 0 first.
    """
    if not has_clock(population):
        return {}
    found: dict[str, Any] = {"virtual_seconds": rounds[-1]["virtual_seconds_total"]}
    if population.config.time.deadline:
        found["late_updates"] = sum(len(line.get("late", ())) for line in rounds)
        found["absent_clients"] = [names[client] for client in sorted(population.absent)]
    if stale := [line for line in rounds if "staleness_max" in line]:
        found["staleness_mean"] = math.fsum(line["staleness_mean"] for line in stale) / len(stale)
        found["staleness_max"] = max(line["staleness_max"] for line in stale)
    if target := population.config.time.target:
        found["virtual_seconds_to_target"] = next(
            (line["virtual_seconds_total"] for line in rounds if _there(line, target)), None
        )
    return found


def _there(line: Mapping[str, Any], target: float) -> bool:
    """Whether the evaluation of a round reached the target: accuracy where there are classes, else loss."""
    accuracy, loss = line.get("accuracy"), line.get("loss")
    if accuracy is not None:
        return bool(accuracy >= target)
    return loss is not None and bool(loss <= target)
