"""One server step of a buffered run: the first answers that arrive train, each on the model that it took along.

FedBuff (Nguyen et al. 2022, arXiv 2106.06639), Algorithm 1: the server applies K answers as soon as they are there, and
clients in flight do not wait for it [N]. The paper adds s(tau) times each delta, divides by K and steps by a learning
rate of the server [N]. Here each tensor moves by sum(w s delta) / sum(w) over the clients that trained it, with the
weights w of the system and a learning rate of 1, so that K fresh answers are the round of the same clients [E].
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedmoe_core.algorithms.base import Algorithm
from fedmoe_core.config.run_config import Config
from fedmoe_core.messages.plan import ExpertPlan
from fedmoe_core.server.state import Population, ServerState, pack_older, unpack_older
from fedmoe_core.simulation.clock.arrivals import Flight, Rules, Schedule, next_arrivals, staleness_factor
from fedmoe_core.simulation.clock.times import client_time, step_time
from fedmoe_core.simulation.cohorts.training import Task
from fedmoe_core.simulation.directory.state_check import StateCheck
from fedmoe_core.simulation.observer import Observer
from fedmoe_core.simulation.round import Round, settle, train
from fedmoe_core.simulation.worlds.federation import Federation

PREFIX = "in_flight/"  # what the names of a checkpoint's tensors begin with


@dataclass(frozen=True)
class InFlight:
    """What a buffered run carries from step to step beside the server's state.

    Attributes:
        schedule: who is in flight, and the clock.
        states: by version, the states that clients in flight were planned from. A state shares with the next one what
            did not change between them.
    """

    schedule: Schedule = field(default_factory=Schedule)
    states: Mapping[int, ServerState] = field(default_factory=dict)


def play_step(
    world: Federation, state: ServerState, flying: InFlight, observer: Observer
) -> tuple[ServerState, InFlight, Round]:
    """Play one server step: K answers arrive, their clients train, exact sums meet, the server applies them."""
    config, population, began = world.config, world.population, time.perf_counter()
    states = {**flying.states, state.round: state}

    def seconds_of(clients: Sequence[int]) -> list[float]:
        return [planned_seconds(population, plan) for plan in world.algorithm.plan(state, clients)]

    with world.ranks.together(f"training step {state.round + 1}"):
        rules = Rules.of(config, absent=population.absent)
        arrived, schedule = next_arrivals(rules, flying.schedule, state.round, seconds_of)
        tasks = [
            Task(states[version], group, staleness_factor(state.round - version, config.time.staleness))
            for version in sorted({flight.version for flight in arrived})
            for group in world.groups(plans_of(world, states[version], arrived))
        ]
        trained = train(world, state.round, tasks, observer, began=began)
    after, played = settle(world, state, trained)
    clocked = step_time(
        population,
        played.updates,
        arrived,
        step=state.round,
        since=flying.schedule.now,
        in_flight=len(schedule.flights),
    )
    needed = {flight.version for flight in schedule.flights}
    kept = InFlight(schedule, {version: states[version] for version in sorted(needed)})
    return after, kept, replace(played, time=clocked)


def planned_seconds(population: Population, plan: ExpertPlan) -> float:
    """Return the virtual seconds until a client answers that begins now, straggling included."""
    return client_time(population, plan.client, plan.round, plan.predicted).seconds


def plans_of(world: Federation, state: ServerState, arrived: Sequence[Flight]) -> list[ExpertPlan]:
    """Plan for those who took the model of this state along, by ascending client: the plans that they left with.

    Raises:
        ValueError: the algorithm plans otherwise than when they left, so a plan depends on more than it may.
    """
    flights = sorted((flight for flight in arrived if flight.version == state.round), key=lambda flight: flight.client)
    plans = world.algorithm.plan(state, [flight.client for flight in flights])
    for flight, plan in zip(flights, plans, strict=True):
        if flight.dispatched + planned_seconds(world.population, plan) != flight.arrives:
            raise ValueError(
                f"algorithm={world.config.algorithm!r} planned otherwise for client {flight.client} than when it left; "
                "let its plans depend on state and client alone, or set asynchronous = False in its class"
            )
    return plans


def refuse_rounds_only(config: Config, form: type[Algorithm]) -> None:
    """Refuse a buffered run of a system that needs all clients of a round at once.

    Raises:
        ValueError: the class of the algorithm does not say that it is ``asynchronous``.
    """
    if config.time.mode == "buffered" and not form.asynchronous:
        raise ValueError(
            f"time.mode=buffered is not for algorithm={config.algorithm!r}, whose plans or averages need a whole "
            "round; choose hfedmoe, hfedmoe_plus, random, most_activated, reap_experts, fedavg or fedavg_smallest, or "
            "set time.mode=rounds"
        )


def pack_in_flight(flying: InFlight, state: ServerState) -> dict[str, Tensor]:
    """Put what is in flight beside the packed ``state``: of an older state what it does not share with the next one."""
    schedule, flights = flying.schedule, flying.schedule.flights
    packed = {
        "now": torch.tensor(schedule.now, dtype=torch.float64),
        "drawn": torch.tensor(schedule.drawn, dtype=torch.int64),
        "times": torch.tensor([[f.arrives, f.dispatched] for f in flights], dtype=torch.float64).view(-1, 2),
        "whence": torch.tensor([[f.client, f.version] for f in flights], dtype=torch.int64).view(-1, 2),
    }
    newer = state
    for version in sorted(flying.states, reverse=True):
        older = flying.states[version]
        packed |= {f"{version}/{key}": tensor for key, tensor in pack_older(older, newer).items()}
        newer = older
    return {f"{PREFIX}{key}": tensor for key, tensor in packed.items()}


def require_in_flight(check: StateCheck, packed: Mapping[str, Tensor], round: int) -> None:
    """Refuse what no buffered run of this configuration has beside its state after ``round`` steps.

    Raises:
        ValueError: as ``StateCheck.require``.
    """
    own = {key.removeprefix(PREFIX): tensor for key, tensor in packed.items()}
    number = torch.Size([])
    check.like(own, {"now": (torch.float64, number), "drawn": (torch.int64, number)})
    flights = own["whence"].shape[:1] if "whence" in own and own["whence"].ndim else torch.Size([0])
    pair = torch.Size([*flights, 2])
    check.like(own, {"times": (torch.float64, pair), "whence": (torch.int64, pair)})
    check.between(own, "now", 0.0, sys.float_info.max)
    check.between(own, "times", 0.0, sys.float_info.max)
    check.between(own, "drawn", 0, 2**62)
    client_F, version_F = own["whence"].T
    check.between({"client": client_F}, "client", 0, len(check.begin.visits) - 1)
    check.between({"version": version_F}, "version", 0, round)
    parts: dict[str, dict[str, Tensor]] = {str(version): {} for version in version_F.tolist()}
    for key, tensor in own.items():
        version, slash, name = key.partition("/")
        if slash and version not in parts:
            check.refuse(f"{PREFIX}{key}", "is of a state that no client in flight took along")
        if slash:
            parts[version][name] = tensor
    for version, part in parts.items():
        check.require(part, int(version), whole=False)


def unpack_in_flight(
    packed: Mapping[str, Tensor], state: ServerState, *, device: torch.device | str = "cpu"
) -> InFlight:
    """Rebuild what ``pack_in_flight`` took apart, the models on ``device``.

    Args:
        packed: held to ``require_in_flight``.
        state: the unpacked state that it lies beside.
        device: for the models.
    """
    own = {key.removeprefix(PREFIX): tensor for key, tensor in packed.items() if key.startswith(PREFIX)}
    flights = tuple(
        Flight(arrives, client, version, dispatched)
        for (arrives, dispatched), (client, version) in zip(own["times"].tolist(), own["whence"].tolist(), strict=True)
    )
    states, newer = dict[int, ServerState](), state
    for version in sorted({flight.version for flight in flights}, reverse=True):
        part = {key.removeprefix(f"{version}/"): t for key, t in own.items() if key.startswith(f"{version}/")}
        newer = states[version] = unpack_older(part, newer, round=version, device=device)
    return InFlight(Schedule(own["now"].item(), int(own["drawn"]), flights), states)
