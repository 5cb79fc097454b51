"""All systems on a model whose layers have biases, a correction bias, groups, a scale and shared experts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from everything import load_everything
from tiny_corpus import make_config

from fedmoe_core.config.run_config import Config
from fedmoe_core.config.systems import ALGORITHMS
from fedmoe_core.simulation import prepare
from fedmoe_core.simulation.observer import NullObserver
from fedmoe_core.simulation.prepare import build_world
from fedmoe_core.simulation.process_group import Ranks
from fedmoe_core.simulation.round import play_round

Make = Callable[..., Config]
EXPERTS, ROUTERS = {"w_in", "w_out", "bias_in", "bias_out"}, {"router", "router_bias"}
FACTORS = {"a_in", "b_in", "a_out", "b_out"}
# What moves in the global model where it is not everything; FlexLoRA folds adapters into the matrices alone, FLEX-MoE
# leaves gates with their clients, FFT-MoE trains grafts, which have no bias.
MOVES = {
    "flame": FACTORS | ROUTERS,
    "hetlora": FACTORS | ROUTERS,
    "flexlora": {"w_in", "w_out"} | ROUTERS,
    "flex_moe": EXPERTS,
    "fft_moe": {"w_in", "w_out", "router"},
}


@pytest.fixture
def config(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Make:
    monkeypatch.setattr(prepare, "find_adapter", lambda name: load_everything)
    return make_config(tmp_path, tmp_path_factory.getbasetemp() / "everything")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_system_trains_and_pays_for_all_of_it(config: Make, algorithm: str) -> None:
    budget = "unlimited" if algorithm in ("fedavg", "fft_moe") else "memory=70%"
    made = config(f"algorithm={algorithm}", f"budgets={budget}", "train.trunk=fedavg")
    world = build_world(made.resolved(), Ranks(), NullObserver())
    state = world.algorithm.init(world.params)
    moved: set[str] = set()
    for _ in range(2):
        before = state.params
        state, round_ = play_round(world, state, NullObserver())
        assert [update.error for update in round_.updates] == [""] * 4
        for update, plan in zip(round_.updates, round_.plans, strict=True):
            for name in ("memory_bytes", "flops", "bytes_down", "bytes_up"):
                assert getattr(update.cost, name) <= getattr(plan.predicted, name), (name, update.cost, plan.predicted)
            assert update.cost.bytes_down == plan.predicted.bytes_down
            assert update.cost.bytes_up == plan.predicted.bytes_up
            assert update.cost.memory_bytes >= 0.5 * plan.predicted.memory_bytes
        moved |= {key for key, old in before.items() if not torch.equal(old, state.params[key])}
    of_layers = {key.split(".")[2] for key in moved if key.startswith("moe.")}
    assert of_layers == MOVES.get(algorithm, EXPERTS | ROUTERS)
    shared = {key for key in moved if "shared_expert" in key}
    frozen = algorithm == "fft_moe"  # with the blocks that it grafts onto
    assert len(shared) == (0 if frozen else 4 * world.adapter.spec.num_layers)
