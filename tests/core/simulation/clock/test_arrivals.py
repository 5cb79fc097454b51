"""The order of arrivals in a buffered run: by hand, and what holds for every schedule."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmoe_core.simulation.clock.arrivals import Flight, Rules, Schedule, draw, next_arrivals, staleness_factor


def steps(rules: Rules, took: dict[int, float], count: int) -> list[tuple[tuple[Flight, ...], Schedule]]:
    """The first steps of a run in which a client always takes equally long."""
    schedule, found = Schedule(), []
    for version in range(count):
        arrived, schedule = next_arrivals(rules, schedule, version, lambda clients: [took[c] for c in clients])
        found.append((arrived, schedule))
    return found


def test_with_all_clients_in_flight_the_places_of_a_buffer_are_filled_after_its_step() -> None:
    rules = Rules(clients=(0, 1, 2), in_flight=3, buffer=2, seed=0)
    found = steps(rules, {0: 1.0, 1: 2.0, 2: 10.0}, 6)
    slow = Flight(arrives=10.0, client=2, version=0, dispatched=0.0)
    for version, (arrived, schedule) in enumerate(found[:5]):
        start = 2.0 * version
        assert arrived == (Flight(start + 1, 0, version, start), Flight(start + 2, 1, version, start))
        assert schedule == Schedule(now=start + 2, drawn=3 + 2 * version, flights=(slow,))
    # At 10 seconds clients 1 and 2 arrive at once: the lower number filled the buffer, the other opens the next one.
    arrived, schedule = found[5]
    assert arrived == (slow, Flight(11.0, 0, 5, 10.0))
    assert schedule == Schedule(now=11.0, drawn=13, flights=(Flight(12.0, 1, 5, 10.0),))


def test_at_an_arrival_another_client_leaves_with_the_same_version() -> None:
    rules = Rules(clients=(0, 1, 2, 3, 4), in_flight=2, buffer=2, seed=7)
    a, b, c = draw(rules, Schedule(), 3)
    took = dict.fromkeys(range(5), 100.0) | {a: 5.0, b: 1.0, c: 2.0}
    (first, schedule), (second, after) = steps(rules, took, 2)
    assert first == (Flight(1.0, b, 0, 0.0), Flight(3.0, c, 0, 1.0))
    assert schedule == Schedule(now=3.0, drawn=3, flights=(Flight(5.0, a, 0, 0.0),))
    d, e = draw(rules, schedule, 2)  # one for the vacant place, one for the first arrival
    assert a not in (d, e)
    leaves = sorted([Flight(5.0, a, 0, 0.0), Flight(3.0 + took[d], d, 1, 3.0)])
    last = sorted([leaves[1], Flight(leaves[0].arrives + took[e], e, 1, leaves[0].arrives)])
    assert second == (leaves[0], last[0])
    assert after == Schedule(now=last[0].arrives, drawn=5, flights=(last[1],))


def test_a_fast_newcomer_may_arrive_in_the_buffer_in_which_it_left() -> None:
    rules = Rules(clients=(0, 1, 2, 3), in_flight=2, buffer=3, seed=1)
    a, b, c, d = draw(rules, Schedule(), 4)
    ((arrived, schedule),) = steps(rules, {a: 50.0, b: 1.0, c: 1.0, d: 1.0}, 1)
    assert [flight.client for flight in arrived] == [b, c, d]
    assert [flight.dispatched for flight in arrived] == [0.0, 1.0, 2.0]
    assert schedule.flights == (Flight(50.0, a, 0, 0.0),)


@given(
    clients=st.integers(1, 9),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    seed=st.integers(0, 2**16),
    absent=st.booleans(),
)
def test_every_schedule_keeps_the_rules(clients: int, sizes: tuple[int, int], seed: int, absent: bool) -> None:
    present = tuple(range(1 if absent and clients > 1 else 0, clients))
    in_flight = min(sizes[0], len(present))
    rules = Rules(present, in_flight, min(sizes[1], in_flight), seed)
    rng, schedule = np.random.default_rng(seed), Schedule()

    def seconds_of(drawn: Sequence[int]) -> list[float]:
        return rng.choice([0.0, 1.0, 2.5], len(drawn)).tolist()  # many ties, and clients that take no time

    for version in range(6):
        before = schedule
        arrived, schedule = next_arrivals(rules, before, version, seconds_of)
        assert len(arrived) == rules.buffer
        times = [flight.arrives for flight in arrived]
        assert times == sorted(times)
        assert all(flight.dispatched <= flight.arrives for flight in arrived)
        assert arrived[-1].arrives == schedule.now >= before.now
        everyone = [flight.client for flight in (*arrived, *schedule.flights)]
        assert len(set(everyone)) == len(everyone)
        assert set(everyone) <= set(present)
        # All but the place of the last arrival are taken again, as long as there are clients.
        assert len(everyone) == min(len(present), in_flight + rules.buffer - 1)
        assert all(
            flight.version == version for flight in (*arrived, *schedule.flights) if flight not in before.flights
        )
        assert schedule.drawn == before.drawn + len(everyone) - len(before.flights)


def test_draws_depend_on_seed_and_count_alone() -> None:
    rules = Rules(tuple(range(50)), in_flight=10, buffer=5, seed=3)
    later = Schedule(now=9.0, drawn=4)
    assert draw(rules, Schedule(), 6)[:4] == draw(rules, Schedule(now=1.0), 4)
    assert draw(rules, later, 3) == draw(rules, later, 3) != draw(rules, Schedule(), 3)
    assert sorted(draw(rules, later, 60)) == list(range(50))


@pytest.mark.parametrize(
    ("staleness", "exponent", "factor"), [(0, 0.5, 1.0), (7, 0.0, 1.0), (8, 0.5, 1 / 3), (1, 2.0, 0.25)]
)
def test_the_staleness_factor_is_a_power_of_one_plus_tau(staleness: int, exponent: float, factor: float) -> None:
    assert staleness_factor(staleness, exponent) == pytest.approx(factor, rel=1e-15)
    assert staleness_factor(0, exponent) == 1.0
