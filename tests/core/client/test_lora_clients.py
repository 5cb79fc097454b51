"""Clients that train adapters: what moves, what is sent, what it costs, at ranks of their own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_corpus import make_config

from fedmoe_core.algorithms import base as algorithms
from fedmoe_core.config.run_config import Config
from fedmoe_core.layer.lora import FACTORS
from fedmoe_core.model.submodel import SubModel
from fedmoe_core.server.state import ServerState
from fedmoe_core.simulation import run as simulate
from fedmoe_core.simulation.evaluation import evaluate_clients
from fedmoe_core.simulation.observer import NullObserver
from fedmoe_core.simulation.prepare import build_world
from fedmoe_core.simulation.process_group import Ranks
from fedmoe_core.simulation.round import Round, play_round
from fedmoe_core.simulation.world import World

Make = Callable[..., Config]
RANK = 4


@pytest.fixture
def config(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    return make_config(tmp_path, tmp_path_factory.getbasetemp() / "tiny")


@pytest.fixture(params=["ToyLora", "ToyRound"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(algorithms, "PLACES", {**algorithms.PLACES, "random": f"toy_lora:{request.param}"})
    return str(request.param)


def played(config: Config) -> tuple[World, ServerState, Round]:
    world = build_world(config.resolved(), Ranks(), NullObserver())
    state, round_ = play_round(world, world.algorithm.init(world.params), NullObserver())
    return world, state, round_


def toy(config: Make, *overrides: str, **words: Any) -> Config:
    return config("algorithm=random", "budgets=unlimited", *overrides, **words)


def moved(world: World, state: ServerState) -> set[str]:
    return {key.split(".")[2] for key, old in world.params.items() if not torch.equal(old, state.params[key])}


def test_only_what_is_aggregated_moves(config: Make, form: str) -> None:
    world, state, round_ = played(toy(config))
    assert [update.error for update in round_.updates] == [""] * 4
    assert moved(world, state) == ({"router", *FACTORS} if form == "ToyLora" else {"router", "w_in", "w_out"})
    if form == "ToyRound":
        return
    assert state.params["moe.0.a_in"].shape == (8, RANK, 32)
    old, new = (params["moe.0.b_in"] for params in (world.params, state.params))
    assert not old.any()  # adapters start as no change
    assert new[0].any()
    assert not new[1].any()  # an expert whose adapter nobody trained
    # Only client 3 has the last rank, so its own step is the whole step there.
    assert new[0, :, 3].any()
    scales = [state.memory[f"scale/{client}"] for client in range(4)]
    assert all(not torch.equal(scale, torch.full((2,), 1.5)) for scale in scales)
    following = world.algorithm.plan(state, [2])[0]
    assert following.extras.out_scale_L == tuple(scales[2].tolist())


def test_fresh_adapters_are_the_global_model_bit_for_bit(
    config: Make, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = build_world(toy(config).resolved(), Ranks(), NullObserver())
    adapted = evaluate_clients(world, world.algorithm.init(world.params))
    monkeypatch.undo()
    plain = build_world(config("algorithm=random", "budgets=unlimited").resolved(), Ranks(), NullObserver())
    assert evaluate_clients(plain, plain.algorithm.init(plain.params)).loss_C == adapted.loss_C


def test_inv10_runs_with_adapters_resume_to_the_same_bits(config: Make, form: str, tmp_path: Path) -> None:
    whole = simulate.run(toy(config, out_name="whole"))

    class Stop(NullObserver):
        def on_round(self, round: int, rounds: int, record: Any) -> None:
            if round == 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate.run(toy(config, out_name="cut"), observer=Stop())
    assert simulate.resume(tmp_path / "cut")["model_hash"] == whole["model_hash"]
    assert whole["loss_after"] != whole["loss_before"]


@pytest.mark.parametrize("trunk", ["frozen", "fedavg"])
def test_inv1_inv2_costs_of_adapters_are_bounded_by_rank(config: Make, form: str, tmp_path: Path, trunk: str) -> None:
    summary = simulate.run(toy(config, "train.batch_size=4", f"train.trunk={trunk}"))
    assert summary["refused_updates"] == 0
    ledger = [json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
    for entry in ledger:
        predicted, real = entry["predicted"], entry["real"]
        assert real["memory_bytes"] <= predicted["memory_bytes"] <= 1.10 * real["memory_bytes"], entry
        assert real["flops"] <= predicted["flops"]
        assert real["bytes_up"] == predicted["bytes_up"]
        assert real["bytes_down"] == predicted["bytes_down"]
    first, second = ledger[:4], ledger[4:]
    ups = [entry["real"]["bytes_up"] for entry in first]
    factors = 4 * (8 if form == "ToyLora" else 16) * (32 + 32 + 16 + 32)  # per rank: experts x (H + 2I + I + H)
    if form == "ToyLora":
        assert np.diff(ups).tolist() == [factors] * 3
        base = 16 * 4 * (32 * 32 + 16 * 32)
        trunk_bytes = first[0]["real"]["bytes_down"] - second[0]["real"]["bytes_down"] - base
        assert trunk_bytes >= 0  # the frozen base travels once, the factors every round
        assert second[0]["real"]["bytes_down"] < base
    else:
        assert ups[2] - ups[0] == 2 * factors
        assert ups[1] == ups[3] < ups[0]  # those who only look send statistics


def test_a_rank_that_was_not_declared_is_refused(config: Make, form: str) -> None:
    world = build_world(toy(config).resolved(), Ranks(), NullObserver())
    for rank in (0, RANK + 1):
        with pytest.raises(ValueError, match=f"rank {rank}; 1 to {RANK} were declared"):
            world.population.costs_at(rank)
        with pytest.raises(ValueError, match=f"rank {rank} is outside"):
            world.adapter.configure(world.params, SubModel(lora_rank=rank))
