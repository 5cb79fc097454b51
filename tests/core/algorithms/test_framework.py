"""What the simulator offers to algorithms, by one that uses all of it: same bits, paid for, and never leaking."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_corpus import make_config
from toy import Toy

from fedmoe_core.algorithms.base import algorithm_class
from fedmoe_core.config.run_config import Config
from fedmoe_core.config.systems import title_of
from fedmoe_core.server.state import ServerState
from fedmoe_core.simulation import launch
from fedmoe_core.simulation import run as simulate
from fedmoe_core.simulation.directory.checkpoint import load_checkpoint
from fedmoe_core.simulation.identity import code_version
from fedmoe_core.simulation.observer import NullObserver
from fedmoe_core.simulation.prepare import build_world
from fedmoe_core.simulation.process_group import Ranks
from fedmoe_core.simulation.round import Round, play_round
from fedmoe_core.simulation.world import World

Make = Callable[..., Config]


@pytest.fixture
def config(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    return make_config(tmp_path, tmp_path_factory.getbasetemp() / "tiny")


def toy(config: Make, *overrides: str, out: str = "run") -> Config:
    return config("algorithm=toy:Toy", "budgets=unlimited", *overrides, out_name=out)


def played(config: Config) -> tuple[World, ServerState, Round]:
    world = build_world(config.resolved(), Ranks(), NullObserver())
    state, round_ = play_round(world, world.algorithm.init(world.params), NullObserver())
    return world, state, round_


def lines(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def memory_of(run: Path) -> dict[str, torch.Tensor]:
    return {k: v for k, v in load_checkpoint(run / "checkpoint").tensors.items() if k.startswith("memory/")}


def test_a_round_hears_everything_that_the_plan_asked_for(config: Make) -> None:
    world, state, round_ = played(toy(config))
    assert isinstance(world.algorithm, Toy)
    for plan, update in zip(round_.plans, round_.updates, strict=True):
        assert update.status == "ok", update.error
        assert update.validation is not None
        assert update.validation.count > 0
        assert update.metrics == {"validation": update.validation.loss_sum / update.validation.count}
        profile = update.validation_profile
        assert profile is not None
        # Every expert is held or served, so no choice is lost and every real token makes top_k of them.
        np.testing.assert_array_equal(profile.rows_LE.sum(axis=1), plan.top_k * profile.tokens_L)
        assert not profile.rows_LE[~plan.permitted_LE].any()
        assert not profile.lost_mass_L.any()
        assert set(update.private) == {"mass", "gate/0", "gate/1"}
        assert torch.equal(state.memory[f"gate/{update.client}/0"], update.private["gate/0"])


def test_a_local_gate_stays_with_its_client_and_the_global_one_keeps_its_bits(config: Make) -> None:
    world, state, round_ = played(toy(config))
    for layer in range(world.adapter.spec.num_layers):
        assert torch.equal(state.params[f"moe.{layer}.router"], world.params[f"moe.{layer}.router"])
    moved = [update.private["gate/0"] for update in round_.updates]
    assert not torch.equal(moved[0][::2], moved[2][::2])
    following = world.algorithm.plan(state, [1])[0]
    assert torch.equal(following.extras.rows["moe.0.router"][3], state.memory["gate/1/0"][3])
    whole = replace(following, extras=replace(following.extras, keeps=frozenset(), rows={}))
    assert following.extras.keeps == {"router"}
    router_bytes = sum(t.nbytes for k, t in state.params.items() if k.endswith("router"))
    costs = world.population.costs
    assert costs.bytes_down(whole.permitted_LE) - round_.plans[0].predicted.bytes_down == router_bytes


def test_inv10_memory_and_private_tensors_survive_a_resume_bit_for_bit(config: Make, tmp_path: Path) -> None:
    whole = simulate.run(toy(config, out="whole"))

    class Stop(NullObserver):
        def on_round(self, round: int, rounds: int, record: Any) -> None:
            if round == 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate.run(toy(config, out="cut"), observer=Stop())
    assert simulate.resume(tmp_path / "cut")["model_hash"] == whole["model_hash"]
    first, second = memory_of(tmp_path / "whole"), memory_of(tmp_path / "cut")
    assert set(first) == set(second)
    assert len(first) == 4 * 4  # two gates, the profile's mass and the rows of each client
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_inv10_two_ranks_agree_on_private_tensors_bit_for_bit(
    config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = toy(config, "eval.personal=true", out="one")
    one = simulate.run(settings)
    (tmp_path / "two.toml").write_text(replace(settings, out=str(tmp_path / "two"), ranks=2).to_toml())
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    launch.run_ranks(["simulate", str(tmp_path / "two.toml"), "--quiet"], ranks=2, threads=1)
    two = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert two["model_hash"] == one["model_hash"]
    assert two["personal_loss_C"] == one["personal_loss_C"]
    first, second = memory_of(tmp_path / "one"), memory_of(tmp_path / "two")
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_log_shows_a_systems_own_importance_and_label(config: Make, tmp_path: Path) -> None:
    summary = simulate.run(config("algorithm=toy:Outspoken", "budgets=unlimited"))
    assert summary["label"] == "outspoken over 2 rounds"
    shown = [line["importance_LE"] for line in lines(tmp_path / "run") if "importance_LE" in line]
    assert [{value for row_E in found_LE for value in row_E} for found_LE in shown] == [{1 / 8}, {2 / 8}]


def test_importance_is_by_default_the_mean_of_the_clients_scores(config: Make) -> None:
    world, state, _ = played(toy(config, "selection.score=s", "selection.lam=1"))
    usual = [known.prob_sum_LE / known.tokens_L[:, None] for known in state.profiles if known is not None]
    assert len(usual) == 4
    np.testing.assert_allclose(world.algorithm.importance(state), np.mean(usual, axis=0), rtol=1e-12)
    assert world.algorithm.label(world.config) == "Toy"


def test_inv1_inv2_profiling_and_validation_are_charged_and_memory_is_bounded(config: Make, tmp_path: Path) -> None:
    summary = simulate.run(toy(config, "train.batch_size=4"))
    assert summary["refused_updates"] == 0
    for entry in lines(tmp_path / "run", "ledger.jsonl"):
        extra = entry["surcharge"]
        assert extra["flops"] > 0
        for kind in ("flops", "bytes_down", "bytes_up"):
            assert extra[kind] <= entry["real"][kind] <= entry["predicted"][kind], kind
        assert entry["real"]["bytes_up"] == entry["predicted"]["bytes_up"]
        assert entry["real"]["memory_bytes"] <= entry["predicted"]["memory_bytes"]
        assert entry["real"]["experts"] == 8


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ("flops=1e6", r"client 0: the work besides training alone exceeds the budget \(flops"),
        ("experts=7", r"client 0: the plan exceeds its budget \(experts: 8 experts used, 7 experts allowed\)"),
        ("memory=100KiB", r"client 0: the work besides training alone .*memory"),
    ],
)
def test_inv1_a_plan_of_masks_that_does_not_fit_is_refused_by_client_and_amount(
    config: Make, budget: str, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        simulate.run(config("algorithm=toy:Toy", f"budgets={budget}"))


def test_a_classification_head_is_averaged_over_a_frozen_trunk(config: Make, tmp_path: Path) -> None:
    settings = config("algorithm=hfedmoe", "train.trunk=frozen", "budgets=unlimited", labeled=True)
    world, state, round_ = played(settings)
    assert [update.error for update in round_.updates] == [""] * 3
    moved = {key for key, old in world.params.items() if not torch.equal(old, state.params[key])}
    assert {key for key in moved if key.startswith("dense.")} == {"dense.score.weight"}
    for plan, update in zip(round_.plans, round_.updates, strict=True):
        assert update.cost.bytes_up == plan.predicted.bytes_up
        assert update.cost.bytes_down == plan.predicted.bytes_down


def test_an_algorithm_of_the_users_own_is_named_by_its_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_class.py").write_text(
        "from fedmoe_core.algorithms.base import Algorithm, EachAlone\n"
        "from fedmoe_core.algorithms.baselines import RandomExperts\n"
        "class Mine(RandomExperts):\n    'Another name for random experts.'\n"
        "class Unfinished(Algorithm):\n    def client(self, plan, result): ...\n"
        "class Alone(EachAlone):\n    def client(self, plan, result): ...\n    apply = client\n"
        "nothing = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert algorithm_class("own_class:Mine").__name__ == "Mine"
    assert Config.load(overrides=["algorithm=own_class:Mine"]).algorithm == "own_class:Mine"
    assert title_of("own_class:Mine") == "Mine"
    assert title_of("flux") == "Flux"
    for name, message in {
        "own_class:nothing": "does not inherit",
        "own_class:Unfinished": "lacks apply, plan; write them",
        "own_class:Alone": "lacks plan_client; write them",
        "own_class:Absent": "cannot be loaded",
        "no_such_module:X": "cannot be loaded",
        "fedavgg": "did you mean 'fedavg'",
    }.items():
        with pytest.raises(ValueError, match=message):
            algorithm_class(name)
    for word in ("own_class:", ":Mine", "a b:C", "own_class:Mine:More"):
        with pytest.raises(ValueError, match="algorithm"):
            Config.load(overrides=[f"algorithm={word}"])
    before = code_version("transformers", "own_class:Mine")
    assert before != code_version("transformers")
    with (tmp_path / "own_class.py").open("a") as file:
        file.write("# edited\n")
    assert code_version("transformers", "own_class:Mine") != before
