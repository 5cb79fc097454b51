"""A wish that fedmoe does not know: a system outside asks for frozen experts in few bits, in one file of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pytest
from tiny_corpus import make_config

from fedmoe_core.algorithms.baselines import RandomExperts
from fedmoe_core.budget.cost_model import CostModel
from fedmoe_core.config.run_config import Config
from fedmoe_core.messages.plan import ExpertPlan, Extras
from fedmoe_core.model.submodel import SubModel
from fedmoe_core.server.planning import plan_of_masks
from fedmoe_core.server.state import ServerState
from fedmoe_core.simulation.observer import NullObserver
from fedmoe_core.simulation.prepare import build_world
from fedmoe_core.simulation.process_group import Ranks
from fedmoe_core.simulation.round import play_round

Make = Callable[..., Config]
INT8 = 1 + 4 / 32  # bytes a weight: a code, and a share of the scale of its block


@dataclass(frozen=True)
class FewBitsCosts(CostModel):
    """A frozen expert takes little more than a byte a weight."""

    @property
    def frozen_bytes(self) -> int:
        return math.ceil(self.expert_params * INT8) + self.slot_bytes


@dataclass(frozen=True)
class FewBits(Extras):
    """The wish: what it costs and what it makes of the sub-model, and nothing anywhere else."""

    def costs(self, model: CostModel, *, in_state: bool, local_steps: int) -> CostModel:
        plain = super().costs(model, in_state=in_state, local_steps=local_steps)
        decoded = 2 * plain.expert_params * plain.weight_bytes  # of one expert at a time, for its products
        trunk = replace(plain.trunk, buffer_bytes=plain.trunk.buffer_bytes + decoded)
        plain = replace(plain, trunk=trunk)
        return FewBitsCosts(**{field.name: getattr(plain, field.name) for field in fields(CostModel)})

    def shape(self, submodel: SubModel) -> SubModel:
        return replace(super().shape(submodel), frozen_format="int8")


@dataclass(frozen=True)
class Plain(RandomExperts):
    """All experts held, one of each layer training."""

    extras = Extras()

    def plan(self, state: ServerState, clients: Sequence[int]) -> list[ExpertPlan]:
        spec, extras = self.population.spec, type(self).extras
        every_LE = np.ones((spec.num_layers, spec.num_experts), dtype=bool)
        first_LE = every_LE & (np.arange(spec.num_experts) == 0)
        return [plan_of_masks(self.population, state, c, every_LE, first_LE, extras=extras) for c in clients]


@dataclass(frozen=True)
class Frugal(Plain):
    """The same, the frozen experts in int8."""

    extras = FewBits()


@pytest.fixture
def config(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    return make_config(tmp_path, tmp_path_factory.getbasetemp() / "tiny")


def test_inv2_a_wish_from_outside_is_charged_trained_with_and_bounded(config: Make) -> None:
    played = {}
    for name in ("Plain", "Frugal"):
        world = build_world(
            config(
                f"algorithm={__name__}:{name}", "budgets=unlimited", "model_config.expert_width=32", out_name=name
            ).resolved(),
            Ranks(),
            NullObserver(),
        )
        state = world.algorithm.init(world.params)
        after, played[name] = play_round(world, state, NullObserver())
        assert [update.error for update in played[name].updates] == [""] * len(played[name].updates)
        for plan, update in zip(played[name].plans, played[name].updates, strict=True):
            assert update.cost.memory_bytes <= plan.predicted.memory_bytes
        assert {layer.frozen_format for layer in world.adapter.moe} == {None if name == "Plain" else "int8"}
        moved = [key for key in after.params if not (after.params[key] == state.params[key]).all()]
        assert {key.rpartition(".")[2] for key in moved} >= {"w_in", "w_out"}
        world.adapter.configure(world.params)
        assert {layer.frozen_format for layer in world.adapter.moe} == {None}
    spec = world.adapter.spec
    frozen = spec.num_layers * (spec.num_experts - 1) * 3 * spec.hidden_size * spec.intermediate_size
    plain, frugal = played["Plain"], played["Frugal"]
    saved = plain.plans[0].predicted.memory_bytes - frugal.plans[0].predicted.memory_bytes
    decoded = 2 * 3 * spec.hidden_size * spec.intermediate_size * 4
    assert frozen * (4 - INT8) - decoded <= saved <= frozen * (4 - INT8)  # by which stage of a step is the highest
    real = plain.updates[0].cost.memory_bytes - frugal.updates[0].cost.memory_bytes
    assert real > 0.8 * saved
