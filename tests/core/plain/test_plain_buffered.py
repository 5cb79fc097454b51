"""Buffered runs of plain models: rounds where none is stale, refusals, checkpoints that stay small."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_plain import made, normed

from fedmoe_core.algorithms.plain_fedavg import PlainFedAvg
from fedmoe_core.config.run_config import Config
from fedmoe_core.messages.plan import ExpertPlan
from fedmoe_core.model.plain import PlainModel
from fedmoe_core.server.state import ServerState
from fedmoe_core.simulation import run as simulate
from fedmoe_core.simulation.buffered import InFlight, pack_in_flight, play_step, unpack_in_flight
from fedmoe_core.simulation.cohorts.training import Answer, Task
from fedmoe_core.simulation.observer import NullObserver
from fedmoe_core.simulation.process_group import Ranks
from fedmoe_core.simulation.round import Round
from fedmoe_core.simulation.worlds.found_plain import found_plain
from fedmoe_core.simulation.worlds.plain import PlainWorld

Make = Callable[..., Config]
WORDS = ("adapter=own", "clients=6", "rounds=3", "threads=1", "train.batch_size=6", "train.local_steps=3")
SPEEDS = "budgets=speed=1e3,uplink=1kbit;speed=3e3,uplink=3kbit;speed=1e4,uplink=9kbit"
BUFFERED = ("time.mode=buffered", "time.buffer=2", "clients_per_round=4")


@pytest.fixture
def config(tmp_path: Path) -> Make:
    return lambda *words, out="run": Config.load(overrides=[*WORDS, SPEEDS, f"out={tmp_path / out}", *words])


def world_of(config: Config) -> PlainWorld:
    return found_plain(config.resolved(), made(), Ranks(), NullObserver())


def steps(world: PlainWorld, count: int) -> list[tuple[ServerState, InFlight, Round]]:
    state, flying, found = world.algorithm.init(world.params), InFlight(), []
    for _ in range(count):
        state, flying, played = play_step(world, state, flying, NullObserver())
        found.append((state, flying, played))
    return found


def trained(world: PlainWorld, state: ServerState, plan: ExpertPlan) -> Answer:
    (group,) = world.groups([plan])
    with world.training([Task(state, group)]) as in_turn:
        ((_, answers),) = in_turn
        (answer,) = answers
    return answer


@pytest.mark.parametrize("words", [(), ("cohort.clients=2",), ("train.local_epochs=1", "train.lr_final=0.1")])
@pytest.mark.parametrize("model", [made(), made(normed)], ids=["network", "normed"])
def test_a_buffer_of_all_clients_is_a_round(config: Make, words: tuple[str, ...], model: PlainModel) -> None:
    rounds = simulate.run(config(*words, out="rounds"), adapter=model, observer=NullObserver())
    asked = config(*words, "time.mode=buffered", "time.buffer=6", out="buffered")
    buffered = simulate.run(asked, adapter=model, observer=NullObserver())
    assert buffered["model_hash"] == rounds["model_hash"]
    assert buffered["virtual_seconds"] >= rounds["virtual_seconds"]  # predicted, and an epoch's last batch is small


def test_inv10_each_answer_comes_from_the_model_and_the_rate_of_its_version(config: Make) -> None:
    """The stale answers of a step, trained again by hand on the older states, give the same losses."""
    world = world_of(config(*BUFFERED, "rounds=8", "train.lr_final=0.1", "time.straggle=0.5"))
    found, stale = steps(world, 8), 0
    states = [world.algorithm.init(world.params), *(state for state, _, _ in found)]
    for _, _, played in found:
        assert played.time is not None
        for update in played.updates:
            version = played.time.flights[update.client].version
            assert update.round == version
            (plan,) = world.algorithm.plan(states[version], [update.client])
            answer = trained(world, states[version], plan)
            assert (answer.update.loss_first, answer.update.loss_last) == (update.loss_first, update.loss_last)
            stale += version < played.index
    assert stale > 3


def test_a_lone_stale_answer_moves_the_current_model_by_its_share(config: Make) -> None:
    world = world_of(config("time.mode=buffered", "time.buffer=1", "clients_per_round=2", "time.staleness=1"))
    found = steps(world, 8)
    states = [world.algorithm.init(world.params), *(state for state, _, _ in found)]
    stale = [played for _, _, played in found if played.time is not None and max(played.time.staleness.values())]
    assert stale
    for played in stale:
        assert played.time is not None
        ((client, staleness),) = played.time.staleness.items()
        version = played.index - staleness
        (plan,) = world.algorithm.plan(states[version], [client])
        answer = trained(world, states[version], plan)
        for key, delta in answer.update.deltas.items():
            moved = states[played.index + 1].params[key].double() - states[played.index].params[key].double()
            expected = delta.double() / (1 + staleness)
            assert (moved - expected).norm() <= 1e-4 * expected.norm(), key


def test_what_is_in_flight_comes_back_from_a_checkpoint_as_it_was(config: Make) -> None:
    world = world_of(config(*BUFFERED))
    state, flying, _ = steps(world, 5)[-1]
    assert len(flying.states) > 1
    packed = pack_in_flight(flying, state)
    back = unpack_in_flight(packed, state)
    assert back.schedule == flying.schedule
    assert list(back.states) == sorted(flying.states, reverse=True)
    for version, kept in flying.states.items():
        found = back.states[version]
        assert (found.round, found.visits) == (version, kept.visits)
        assert all(torch.equal(found.params[key], tensor) for key, tensor in kept.params.items())


def test_the_checkpoint_does_not_grow_with_the_steps(config: Make) -> None:
    asked = config(*BUFFERED, "rounds=30", "time.straggle=0.3", "eval.every=30")
    sizes: list[int] = []

    class Weigh(NullObserver):
        def on_round(self, round: int, rounds: int, record: object) -> None:
            if round:
                sizes.append(sum(path.stat().st_size for path in Path(asked.out, "checkpoint").iterdir()))

    simulate.run(asked, adapter=made(), observer=Weigh())
    assert len(sizes) == 30
    assert max(sizes[15:]) <= 1.2 * max(sizes[5:15])
    world = world_of(asked)
    for state, flying, _ in steps(world, 30):
        assert set(flying.states) == {flight.version for flight in flying.schedule.flights}
        assert len(flying.states) <= 4
        assert all(version < state.round for version in flying.states)


def test_a_refused_client_counts_as_an_answer(config: Make) -> None:
    asked = config(*BUFFERED, "aggregation.norm_bound=1e-9", "rounds=4")
    before = world_of(asked).params
    found = steps(world_of(asked), 4)
    for state, _, played in found:
        assert [update.status for update in played.updates] == ["refused", "refused"]
        assert not played.applied
        assert all(torch.equal(state.params[key], tensor) for key, tensor in before.items())
    assert found[-1][0].round == 4
    assert simulate.run(asked, adapter=made(), observer=NullObserver())["refused_updates"] == 8


class Crowded(PlainFedAvg):
    """Asks less of clients that are planned for together, which no buffered run can serve."""

    def plan(self, state: ServerState, clients: Sequence[int]) -> list[ExpertPlan]:
        plans = super().plan(state, clients)
        return [
            replace(plan, predicted=replace(plan.predicted, flops=plan.predicted.flops / len(plans))) for plan in plans
        ]


def test_plans_that_depend_on_who_else_is_planned_for_are_refused(config: Make) -> None:
    world = world_of(config(*BUFFERED))
    world = replace(world, algorithm=Crowded(world.population))
    with pytest.raises(ValueError, match=r"planned otherwise for client \d than when it left.*asynchronous = False"):
        steps(world, 1)
