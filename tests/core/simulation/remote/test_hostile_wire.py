"""Hostile bytes by the thousand in a device's place: none accepted, no bit of the model moved."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from near import Near
from tiny_corpus import make_config
from wire_cases import cases, claiming, measured, put_together, taken_apart, tampered

from fedmoe_core.model.spec import model_hash
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


def test_inv11_hostile_bytes_move_nothing(tmp_path: Path) -> None:
    config = make_config(tmp_path, tmp_path / "shared")("train.timeout=60", "train.local_steps=1").resolved()
    good: dict[int, bytes] = {}

    def kept(client: int, turn: int, answer: bytes) -> bytes:
        return good.setdefault(client, answer)

    near = Near(*[Words(client) for client in range(4)], spoil=kept)
    world = found_remote(near, wait=60)(config, Ranks(), NullObserver())
    assert isinstance(world, RemoteFederation)
    state = world.algorithm.init(world.params)
    after, played = play_round(world, state, NullObserver())
    assert [update.status for update in played.updates] == ["ok"] * 4
    assert model_hash(after.params) != model_hash(state.params)

    hostile = Hostile(near)
    world.roll.exchange = hostile
    generated = {client: list(cases(data, client)) for client, data in good.items()}
    generated[0] += [(f"the answer of client {other}", good[other]) for other in (1, 2, 3)]
    generated[1] += [("not bytes", value) for value in (None, 1, "text", bytearray(good[1]), [good[1]])]
    hostile.lists = {client: [data for _, data in found] for client, found in generated.items()}
    count = sum(map(len, generated.values()))
    assert count >= 2000
    names = {client: [name for name, _ in found] for client, found in generated.items()}
    tasks = [Task(state, group) for group in world.groups(world.algorithm.plan(state, range(4)))]
    statuses, before = Counter[str](), model_hash(state.params)
    while any(hostile.lists.values()):
        sent = {client: names[client].pop() for client, left in hostile.lists.items() if left}
        trained = train(world, 0, tasks, NullObserver(), began=time.perf_counter())
        assert trained.sums.accepted == 0, sent
        for report in trained.reports:
            if report["client"] in sent:
                assert report["status"] in ("refused", "failed"), (sent[report["client"]], report)
                assert 0 < len(report["error"]) <= 300, sent
                statuses[report["status"]] += 1
    assert sum(statuses.values()) == count
    after, played = settle(world, state, trained)
    assert not played.applied
    assert model_hash(after.params) == before


@pytest.mark.parametrize("system", ["flex_moe", "hetlora", "flame"])
def test_inv11_nothing_that_a_client_claims_to_have_measured_or_kept_is_read_unchecked(
    system: str, tmp_path: Path
) -> None:
    config = make_config(tmp_path, tmp_path / "shared")(
        "train.timeout=60", "train.local_steps=1", f"algorithm={system}", "clients=2"
    ).resolved()
    good: dict[int, bytes] = {}

    def kept(client: int, turn: int, answer: bytes) -> bytes:
        return good.setdefault(client, answer)

    near = Near(*[Words(client) for client in range(2)], spoil=kept)
    world = found_remote(near, wait=60)(config, Ranks(), NullObserver())
    assert isinstance(world, RemoteFederation)
    state = world.algorithm.init(world.params)
    _, played = play_round(world, state, NullObserver())
    assert [update.status for update in played.updates] == ["ok"] * 2
    generated = {}
    for client, answer in good.items():
        head, tensors = taken_apart(answer)
        generated[client] = [*tampered(head, tensors), *measured(head, tensors)]
    generated[0] += [("of another system", put_together(*_without_measures(good[0])))]
    world.roll.exchange = hostile = Hostile(near)
    hostile.lists = {client: [data for _, data in found] for client, found in generated.items()}
    assert sum(map(len, generated.values())) >= 300
    names = {client: [name for name, _ in found] for client, found in generated.items()}
    tasks = [Task(state, group) for group in world.groups(world.algorithm.plan(state, range(2)))]
    before = model_hash(state.params)
    while any(hostile.lists.values()):
        sent = {client: names[client].pop() for client, left in hostile.lists.items() if left}
        trained = train(world, 0, tasks, NullObserver(), began=time.perf_counter())
        assert trained.sums.accepted == 0, sent
        assert all(0 < len(report["error"]) <= 300 for report in trained.reports)
    after, played = settle(world, state, trained)
    assert not played.applied
    assert model_hash(after.params) == before


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
