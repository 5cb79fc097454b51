"""Hostile bytes by the thousand in a device's place: none accepted, no bit of the model moved."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from near import Near
from tiny_corpus import make_config
from wire_cases import cases, claiming, measured, put_together, taken_apart, tampered

from fedmoe_core.config.run_config import Config
from fedmoe_core.model.spec import model_hash
from fedmoe_core.server.state import ServerState
from fedmoe_core.simulation.cohorts.training import Task
from fedmoe_core.simulation.observer import NullObserver
from fedmoe_core.simulation.process_group import Ranks
from fedmoe_core.simulation.remote.exchange import FailedReply, Kind
from fedmoe_core.simulation.remote.federation import RemoteFederation, found_remote
from fedmoe_core.simulation.remote.words import Words
from fedmoe_core.simulation.round import play_round, settle, train
from fedmoe_core.simulation.run import run


class Hostile(Near):
    """Devices of which each sends what stands next on its list."""

    def __init__(self, near: Near) -> None:
        self.near, self.lists = near, dict[int, list[Any]]()

    def addresses(self) -> list[int]:
        return self.near.addresses()

    def send(
        self, kind: Kind, messages: Iterable[tuple[int, bytes]], seconds: float
    ) -> Iterator[tuple[int, bytes | FailedReply]]:
        for address, _ in list(messages):
            client = self.near.devices[address].client
            if self.lists[client]:
                yield address, self.lists[client].pop()
                yield address, b"and once more"
        yield 1, b"from somewhere else"


@dataclass(frozen=True)
class Met:
    """A federation whose devices have each answered once, and what they said."""

    near: Near
    world: RemoteFederation
    state: ServerState
    good: dict[int, bytes]


def met(config: Config) -> Met:
    """An honest round; the state is that before it."""
    good: dict[int, bytes] = {}

    def kept(client: int, turn: int, answer: bytes) -> bytes:
        return good.setdefault(client, answer)

    near = Near(*[Words(client) for client in range(config.clients)], spoil=kept)
    world = found_remote(near, wait=60)(config, Ranks(), NullObserver())
    assert isinstance(world, RemoteFederation)
    state = world.algorithm.init(world.params)
    after, played = play_round(world, state, NullObserver())
    assert [update.status for update in played.updates] == ["ok"] * config.clients
    assert model_hash(after.params) != model_hash(state.params)
    return Met(near, world, state, good)


def require_unmoved(met: Met, generated: Mapping[int, Sequence[tuple[str, Any]]]) -> None:
    """All of them are sent in the devices' place; each is refused with a short reason, and the model keeps its bits."""
    world, state = met.world, met.state
    world.roll.exchange = hostile = Hostile(met.near)
    hostile.lists = {client: [data for _, data in found] for client, found in generated.items()}
    names = {client: [name for name, _ in found] for client, found in generated.items()}
    tasks = [Task(state, group) for group in world.groups(world.algorithm.plan(state, range(len(met.good))))]
    seen, before = 0, model_hash(state.params)
    while any(hostile.lists.values()):
        sent = {client: names[client].pop() for client, left in hostile.lists.items() if left}
        trained = train(world, 0, tasks, NullObserver(), began=time.perf_counter())
        assert trained.sums.accepted == 0, sent
        for report in trained.reports:
            if report["client"] in sent:
                assert report["status"] in ("refused", "failed"), (sent[report["client"]], report)
                assert 0 < len(report["error"]) <= 300, sent
                seen += 1
    assert seen == sum(map(len, generated.values()))
    after, played = settle(world, state, trained)
    assert not played.applied
    assert model_hash(after.params) == before


def test_inv11_hostile_bytes_move_nothing(tmp_path: Path) -> None:
    found = met(make_config(tmp_path, tmp_path / "shared")("train.timeout=60", "train.local_steps=1").resolved())
    good = found.good
    generated = {client: list(cases(data, client)) for client, data in good.items()}
    generated[0] += [(f"the answer of client {other}", good[other]) for other in (1, 2, 3)]
    generated[1] += [("not bytes", value) for value in (None, 1, "text", bytearray(good[1]), [good[1]])]
    assert sum(map(len, generated.values())) >= 2000
    require_unmoved(found, generated)


@pytest.mark.parametrize("system", ["flex_moe", "hetlora", "flame"])
def test_inv11_nothing_that_a_client_claims_to_have_measured_or_kept_is_read_unchecked(
    system: str, tmp_path: Path
) -> None:
    words = ("train.timeout=60", "train.local_steps=1", f"algorithm={system}", "clients=2")
    found = met(make_config(tmp_path, tmp_path / "shared")(*words).resolved())
    generated = {}
    for client, answer in found.good.items():
        head, tensors = taken_apart(answer)
        generated[client] = [*tampered(head, tensors), *measured(head, tensors)]
    generated[0] += [("of another system", put_together(*_without_measures(found.good[0])))]
    assert sum(map(len, generated.values())) >= 300
    require_unmoved(found, generated)


@pytest.mark.parametrize("value", [0.0, 1e30])
@pytest.mark.parametrize(
    "words", ["fedmoe fedmoe.patience=1", "flex_moe", "flux model_config.expert_width=32 budgets=memory=90%"]
)
def test_inv11_whatever_a_client_claims_within_the_bounds_the_run_goes_on(
    words: str, value: float, tmp_path: Path
) -> None:
    config = make_config(tmp_path, tmp_path / "shared")(
        "train.timeout=60", "train.local_steps=1", "clients=2", *f"algorithm={words}".split()
    )

    def claimed(client: int, turn: int, answer: bytes) -> bytes:
        return answer if client else claiming(answer, value)

    near = Near(*[Words(client) for client in range(2)], spoil=claimed)
    summary = run(config, observer=NullObserver(), founder=found_remote(near, wait=60))
    assert summary["rounds"] == 2
    assert summary["refused_updates"] == 0
    assert math.isfinite(summary["loss_after"] or 0.0)


def _without_measures(good: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    head, tensors = taken_apart(good)
    return head, {name: tensor for name, tensor in tensors.items() if not name.startswith(("probed", "kept"))}


def test_inv11_an_answer_of_an_earlier_round_or_another_run_is_refused(tmp_path: Path) -> None:
    config = make_config(tmp_path, tmp_path / "shared")("train.timeout=60", "train.local_steps=1").resolved()
    old: dict[int, bytes] = {}

    def replayed(client: int, turn: int, answer: bytes) -> bytes:
        return old.setdefault(client, answer)

    near = Near(*[Words(client) for client in range(4)], spoil=replayed)
    world = found_remote(near, wait=60)(config, Ranks(), NullObserver())
    state, _ = play_round(world, world.algorithm.init(world.params), NullObserver())
    _, played = play_round(world, state, NullObserver())
    assert {update.error for update in played.updates} == {"an answer is for round 0, not for round 1"}
    again = found_remote(near, wait=60)(config, Ranks(), NullObserver())
    _, played = play_round(again, again.algorithm.init(again.params), NullObserver())
    assert all("an answer is for run" in update.error for update in played.updates)
