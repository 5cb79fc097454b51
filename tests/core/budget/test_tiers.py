"""Tiers of bytes named after a share of the experts: what a plain client may hold, and that they bind everybody."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_corpus import make_config

from fedmoe_core.budget.limits import Budget
from fedmoe_core.config.run_config import Config
from fedmoe_core.simulation import run as simulate
from fedmoe_core.simulation.observer import NullObserver
from fedmoe_core.simulation.prepare import build_world
from fedmoe_core.simulation.process_group import Ranks
from fedmoe_core.simulation.world import World

Make = Callable[..., Config]
SHARES = ("12.5", "25", "50", "100")


@pytest.fixture
def config(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    return make_config(tmp_path, tmp_path_factory.getbasetemp() / "tiny")


def tiers(*words: str) -> str:
    """One tier for every share, each resource in ``words`` limited to it."""
    return "budgets=" + ";".join(",".join(f"{word}={share}%" for word in words) for share in SHARES)


def world_of(config: Config) -> World:
    return build_world(config.resolved(), Ranks(), NullObserver())


@pytest.mark.parametrize("labeled", [True, False])
def test_a_tier_of_bytes_lets_a_plain_client_hold_the_experts_of_its_name(config: Make, labeled: bool) -> None:
    worlds = [
        world_of(config("selection.explore=0", tiers(*words), labeled=labeled))
        for words in (("experts",), ("memory",), ("down", "up"))
    ]
    held = []
    for world in worlds:
        plans = world.algorithm.plan(world.algorithm.init(world.params), range(len(world.population.budgets)))
        held.append([int(plan.permitted_LE.sum()) for plan in plans])
        assert all(plan.budget.fits(plan.predicted) for plan in plans)
    total = worlds[0].population.costs.total_experts
    assert held[0] == [int(float(share) / 100 * total) for share in SHARES][: len(held[0])]
    assert held[1] == held[0]
    assert held[2] == held[0]


@pytest.mark.parametrize("name", ["fft_moe", "flame", "fedmoe", "hfedmoe_plus"])
def test_inv1_the_same_bytes_bind_systems_of_every_form(config: Make, name: str) -> None:
    plain = world_of(config(tiers("memory")))
    other = world_of(config(tiers("memory"), f"algorithm={name}"))
    assert [str(budget) for budget in other.population.budgets] == [str(b) for b in plain.population.budgets]
    limits = [budget.memory_bytes for budget in plain.population.budgets]
    assert sorted(limits) == limits
    assert len(set(limits)) == len(SHARES)


def test_inv1_fewer_trained_and_more_held_stay_inside_a_tier_of_memory(config: Make) -> None:
    ours = world_of(config(tiers("memory"), "algorithm=hfedmoe_plus", "plus.explore=0"))
    plans = ours.algorithm.plan(ours.algorithm.init(ours.params), range(4))
    plain = [int(float(share) / 100 * ours.population.costs.total_experts) for share in SHARES]
    for plan, could in zip(plans, plain, strict=True):
        assert plan.budget.fits(plan.predicted)
        assert (plan.trainable_LE <= plan.permitted_LE).all()
        assert plan.trainable_LE.any(axis=1).all()
        assert plan.trainable_LE.sum() <= could <= plan.permitted_LE.sum()
    assert plans[1].permitted_LE.sum() > plain[1]
    assert plans[3].trainable_LE.all()
    summary = simulate.run(config(tiers("memory"), "algorithm=hfedmoe_plus", "rounds=2"))
    assert (summary["budget_violations"], summary["refused_updates"], summary["budgeted"]) == (0, 0, True)
    assert np.isfinite(summary["loss_after"])


def test_a_tier_is_said_in_the_models_own_bytes(config: Make) -> None:
    world = world_of(config(tiers("memory")))
    budget = world.population.budgets[0]
    assert budget.name == "memory=12.5%"
    assert Budget.parse(str(budget)) == budget
