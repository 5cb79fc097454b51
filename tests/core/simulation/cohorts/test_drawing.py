"""Batches that are drawn ahead are those that would be drawn in time, and a large group draws none ahead."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_corpus import make_config

from fedmoe_core.config.run_config import Config
from fedmoe_core.simulation import run as simulate
from fedmoe_core.simulation.cohorts import drawing
from fedmoe_core.simulation.cohorts.cutting import Group
from fedmoe_core.simulation.cohorts.drawing import draw, round_batches
from fedmoe_core.simulation.observer import NullObserver
from fedmoe_core.simulation.prepare import build_world
from fedmoe_core.simulation.process_group import Ranks

Make = Callable[..., Config]


@pytest.fixture
def config(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    return make_config(tmp_path, tmp_path_factory.getbasetemp() / "tiny")


def test_drawn_batches_are_those_of_the_round(config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    world = build_world(config().resolved(), Ranks(), NullObserver())
    plans = world.algorithm.plan(world.algorithm.init(world.params), range(3))
    drawn = draw(world, Group(tuple(plans)))
    assert sorted(drawn) == [0, 1, 2]
    for plan in plans:
        ahead, now = list(round_batches(world, plan, drawn)), list(round_batches(world, plan))
        assert len(ahead) == len(now) == plan.local_steps
        assert all(torch.equal(a.tokens_SN, b.tokens_SN) for a, b in zip(ahead, now, strict=True))
        assert all(torch.equal(a.mask_SN, b.mask_SN) for a, b in zip(ahead, now, strict=True))
    monkeypatch.setattr(drawing, "DRAWN_TOKENS", 1)
    assert draw(world, Group(tuple(plans))) == {}


def test_a_run_does_not_depend_on_what_is_drawn_ahead(config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(world: object, group: Group) -> object:
        calls.append(len(group.plans))
        return draw(world, group)  # type: ignore[arg-type]

    monkeypatch.setattr("fedmoe_core.simulation.worlds.moe.draw", counted)
    ahead = simulate.run(config("cohort.clients=2", out_name="ahead"))["model_hash"]
    assert calls
    assert max(calls) == 2
    monkeypatch.setattr(drawing, "DRAWN_TOKENS", 1)
    assert simulate.run(config("cohort.clients=2", out_name="now"))["model_hash"] == ahead
