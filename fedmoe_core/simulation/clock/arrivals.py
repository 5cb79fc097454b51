"""Who is in flight in a buffered run, when each client arrives, and which arrivals make the next server step.

FedBuff (Nguyen et al. 2022, arXiv 2106.06639): ``in_flight`` is its concurrency, ``buffer`` its K [N]. Nothing here
trains: a client arrives when its plan predicts it, so every rank knows the order before any client begins.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Self

from fedmoe_core.base.rng import counter_rng
from fedmoe_core.config.run_config import Config


@dataclass(frozen=True, order=True)
class Flight:
    """A client on its way; flights are ordered as they arrive.

    Attributes:
        arrives: virtual seconds of the run at which its answer is there.
        client: who; it settles the order of answers that arrive at once.
        version: server steps applied to the model that it took along.
        dispatched: virtual seconds of the run at which it got that model.
    """

    arrives: float
    client: int
    version: int
    dispatched: float


@dataclass(frozen=True)
class Schedule:
    """The state of the clock between two server steps.

    Attributes:
        now: virtual seconds of the run at the last server step.
        drawn: clients drawn so far; it counts the draws of chance.
        flights: who is in flight, in the order of arrival.
    """

    now: float = 0.0
    drawn: int = 0
    flights: tuple[Flight, ...] = ()


@dataclass(frozen=True)
class Rules:
    """What never changes in a buffered run.

    Attributes:
        clients: who may be drawn, ascending.
        in_flight: how many are in flight where so many can be drawn.
        buffer: answers that make a server step.
        seed: of the run.
    """

    clients: tuple[int, ...]
    in_flight: int
    buffer: int
    seed: int

    @classmethod
    def of(cls, config: Config, *, absent: frozenset[int]) -> Self:
        """Read them from the configuration of a buffered run; who is ``absent`` is never drawn."""
        present = tuple(client for client in range(config.clients) if client not in absent)
        return cls(present, config.clients_per_round or config.clients, config.time.buffer, config.seed)


def next_arrivals(
    rules: Rules, schedule: Schedule, version: int, seconds_of: Callable[[Sequence[int]], Sequence[float]]
) -> tuple[tuple[Flight, ...], Schedule]:
    """Let time pass until the buffer is full; return who is in it, in the order of arrival, and what follows.

    First the vacant places are filled, at the moment of the last server step. Then, at each arrival but the last,
    another client leaves with the model of the same version; the place of the last one is filled after the server
    step. A client in flight is not drawn, nor one that is in the buffer, so it is in a buffer once at most. Where
    all others are drawn, places stay vacant until the next step.

    Args:
        rules, schedule: of the run, and as the last step left it.
        version: server steps applied so far.
        seconds_of: virtual seconds that these clients need, straggling included, with the model of this version.
    """
    vacant = rules.in_flight - len(schedule.flights)
    # Who may be drawn does not depend on who arrives first: arrived or still in flight, a client is not drawn again
    # before the step. So all draws come first, and the server plans for these clients at once.
    drawn = draw(rules, schedule, vacant + rules.buffer - 1)
    waiting = deque(zip(drawn, seconds_of(drawn), strict=True))
    flying = list(schedule.flights)
    heapify(flying)

    def leave(now: float) -> None:
        client, seconds = waiting.popleft()
        heappush(flying, Flight(now + seconds, client, version, now))

    for _ in range(min(vacant, len(waiting))):
        leave(schedule.now)
    arrived = [heappop(flying)]
    while len(arrived) < rules.buffer:
        if waiting:
            leave(arrived[-1].arrives)
        arrived.append(heappop(flying))
    return tuple(arrived), Schedule(arrived[-1].arrives, schedule.drawn + len(drawn), tuple(sorted(flying)))


def draw(rules: Rules, schedule: Schedule, count: int) -> list[int]:
    """Draw ``count`` clients that are not in flight, or as many as there are, each by its own counter."""
    flying = {flight.client for flight in schedule.flights}
    free = [client for client in rules.clients if client not in flying]
    drawn: list[int] = []
    while free and len(drawn) < count:
        rng = counter_rng(rules.seed, "dispatch", schedule.drawn + len(drawn))
        drawn.append(free.pop(int(rng.integers(len(free)))))
    return drawn


def staleness_factor(staleness: int, exponent: float) -> float:
    """Return what a change trained ``staleness`` server steps ago counts: (1 + tau)^-a, in (0, 1].

    The polynomial s(tau) of FedBuff's section on staleness, with a = 1/2 there [N]. A fresh change counts 1.

    Example:
        >>> staleness_factor(3, 0.5)
        0.5
    """
    return float((1 + staleness) ** -exponent)
