"""Worlds and single rounds of the systems that keep the whole model resident."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from lora_restated import flame_weights

from fedmoe_core.config.run_config import Config
from fedmoe_core.messages.plan import ExpertPlan
from fedmoe_core.messages.update import ClientUpdate
from fedmoe_core.server.state import ServerState
from fedmoe_core.simulation.observer import NullObserver
from fedmoe_core.simulation.prepare import build_world
from fedmoe_core.simulation.process_group import Ranks
from fedmoe_core.simulation.round import play_round
from fedmoe_core.simulation.world import World

Make = Callable[..., Config]
TIERS = "budgets=experts=25%;experts=50%;experts=100%;unlimited"


def world_of(config: Config) -> World:
    return build_world(config.resolved(), Ranks(), NullObserver())


def started(config: Make, name: str, *overrides: str, **words: Any) -> tuple[World, ServerState]:
    world = world_of(config(f"algorithm={name}", *overrides, **words))
    return world, world.algorithm.init(world.params)


def heard_by(world: World, state: ServerState, monkeypatch: pytest.MonkeyPatch) -> tuple[ServerState, dict[int, Any]]:
    """The state after a round, and each client's plan, result and update with its deltas."""
    seen: dict[int, tuple[ExpertPlan, Any, ClientUpdate]] = {}
    answering = type(world.algorithm).answer

    def answer(self: Any, plan: ExpertPlan, result: Any) -> ClientUpdate:
        seen[plan.client] = (plan, result, answering(self, plan, result))
        return seen[plan.client][2]

    monkeypatch.setattr(type(world.algorithm), "answer", answer)
    after, played = play_round(world, state, NullObserver())
    assert [update.error for update in played.updates] == [""] * len(played.updates)
    monkeypatch.undo()
    return after, seen


def gammas(seen: dict[int, Any], samples_C: np.ndarray, *, temperature: float) -> np.ndarray:
    rows_CLE = np.stack([seen[c][1].profile.rows_LE for c in sorted(seen)])
    steps_C = np.array([len(seen[c][1].losses) for c in sorted(seen)])
    return flame_weights(rows_CLE, steps_C, samples_C, temperature=temperature)
