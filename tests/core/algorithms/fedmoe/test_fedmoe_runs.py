"""FedMoE in whole runs: under hard budgets, resumed, on text and on labelled data."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_corpus import make_config

from fedmoe_core.algorithms.fedmoe.fedmoe import SETTLED, ClientMap
from fedmoe_core.algorithms.fedmoe.full_model_probe import WholeModelProbe, affordable_probe
from fedmoe_core.config.run_config import Config
from fedmoe_core.messages.plan import Extras
from fedmoe_core.server.planning import plan_of_masks
from fedmoe_core.simulation import run as simulate
from fedmoe_core.simulation.cohorts.training import train_alone
from fedmoe_core.simulation.directory.checkpoint import load_checkpoint
from fedmoe_core.simulation.observer import NullObserver
from fedmoe_core.simulation.prepare import build_world
from fedmoe_core.simulation.process_group import Ranks

Make = Callable[..., Config]


@pytest.fixture
def config(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    make = make_config(tmp_path, tmp_path_factory.getbasetemp() / "tiny")
    return lambda *words, **rest: make("algorithm=fedmoe", "rounds=3", *words, **rest)


def lines(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def map_of(run: Path) -> ClientMap:
    tensors = load_checkpoint(run / "checkpoint").tensors
    return ClientMap(**{k.removeprefix("memory/"): t.numpy() for k, t in tensors.items() if k.startswith("memory/")})


def test_three_rounds_on_text(config: Make, tmp_path: Path) -> None:
    """Golden: sizes by budget, who probed, and that the loss falls; 16 experts in 2 layers, 90 % used at first."""
    summary = simulate.run(config())
    known = map_of(tmp_path / "run")
    assert known.held_CLE.sum(axis=(1, 2)).tolist() == [2, 3, 7, 14]  # of 2, 4, 8 and 16
    assert known.probe_CLE.any(axis=(1, 2)).tolist() == [False, False, False, True]
    np.testing.assert_allclose(known.probe_CLE[3].sum(axis=1), 2)  # top-2 of all experts
    assert known.phase_C.tolist() == [SETTLED] * 4
    assert not (known.usage_CLE[~known.held_CLE]).any()
    assert (summary["budget_violations"], summary["refused_updates"], summary["budgeted"]) == (0, 0, True)
    assert summary["loss_after"] < summary["loss_before"]
    ledger = lines(tmp_path / "run", "ledger.jsonl")
    assert [entry["surcharge"]["experts"] for entry in ledger if entry["client"] == 3] == [16, 0, 0]
    for entry in ledger:
        for kind in ("memory_bytes", "flops", "bytes_down", "bytes_up", "experts"):
            assert entry["real"][kind] <= entry["predicted"][kind], kind


@pytest.mark.parametrize("tunings", [0, 2])
def test_inv2_a_probe_is_bounded_by_its_prediction_and_leaves_the_model_alone(config: Make, tunings: int) -> None:
    """What probing adds is measured on a client that trains the least: its peak is that of the whole model."""
    made = config(f"fedmoe.tunings={tunings}", "train.batch_size=1", "model_config.expert_width=64")
    world = build_world(made.resolved(), Ranks(), NullObserver())
    facts, least_LE = world.population, np.zeros((2, 8), dtype=bool)
    least_LE[:, 0] = True
    found = affordable_probe(facts, 3, Extras(validate=True), tunings=tunings, first_participation=True)
    assert found is not None
    state = world.algorithm.init(world.params)
    plan = plan_of_masks(facts, state, 3, least_LE, extras=Extras(before=found[0], surcharge=found[1]))
    assert plan.predicted.memory_bytes == found[1].memory_bytes  # more than training needs
    update = train_alone(world, state, plan).update
    assert 0.9 * found[1].memory_bytes <= update.cost.memory_bytes <= found[1].memory_bytes
    whole = train_alone(world, state, replace(plan, extras=Extras())).update
    assert update.cost.memory_bytes > whole.cost.memory_bytes
    assert all(torch.equal(update.deltas[key], delta) for key, delta in whole.deltas.items())


def test_adapters_move_the_profile_and_are_gone_after_it(config: Make) -> None:
    world = build_world(config("train.lr=0.02").resolved(), Ranks(), NullObserver())
    state, probes = world.algorithm.init(world.params), []
    plan = world.algorithm.plan(state, [3])[0]
    for tunings in (0, 0, 1, 5):
        update = train_alone(
            world, state, replace(plan, extras=replace(plan.extras, before=WholeModelProbe(tunings, 8)))
        ).update
        probes.append(update.private["probe"])
        assert torch.allclose(probes[-1].sum(dim=1), torch.full((2,), 2.0, dtype=torch.float64))
    assert torch.equal(probes[0], probes[1])
    moved = [float((probe - probes[0]).abs().sum()) for probe in probes[2:]]
    assert 0 < moved[0] < moved[1]


def test_inv1_every_kind_of_budget_holds(config: Make) -> None:
    limits = ("memory=550KiB", "down=150kB", "up=80kB", "flops=4e7")
    summary = simulate.run(config("budgets=" + json.dumps(limits), "fedmoe.patience=1"))
    assert (summary["budget_violations"], summary["refused_updates"]) == (0, 0)


def test_inv10_a_resumed_run_has_the_same_bits(config: Make, tmp_path: Path) -> None:
    whole = simulate.run(config("clients_per_round=3", "fedmoe.patience=1", out_name="whole"))

    class Stop(NullObserver):
        def on_round(self, round: int, rounds: int, record: Any) -> None:
            if round == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate.run(config("clients_per_round=3", "fedmoe.patience=1", out_name="cut"), observer=Stop())
    assert simulate.resume(tmp_path / "cut")["model_hash"] == whole["model_hash"]
    one, two = map_of(tmp_path / "whole"), map_of(tmp_path / "cut")
    assert all(np.array_equal(getattr(one, name), getattr(two, name)) for name in vars(one))


def test_accuracy_is_the_quality_of_labeled_data(config: Make, tmp_path: Path) -> None:
    simulate.run(config("rounds=2", labeled=True))
    found = {line["client"]: line for line in lines(tmp_path / "run", "metrics.jsonl") if line["type"] == "client"}
    np.testing.assert_allclose(map_of(tmp_path / "run").best_C, [found[c]["validation_accuracy"] for c in range(3)])
