"""FedProx as an option of local training: the proximal gradient by autograd, its copy charged, its pull visible."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from one_layer import H, OneLayer
from tiny_corpus import make_config

from fedmoe_core.client.step import Stepper
from fedmoe_core.config.run_config import Config, TrainConfig
from fedmoe_core.simulation import run as simulate
from fedmoe_core.simulation.observer import NullObserver
from fedmoe_core.simulation.prepare import build_world
from fedmoe_core.simulation.process_group import Ranks
from fedmoe_core.simulation.round import play_round

Make = Callable[..., Config]


@pytest.fixture
def config(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    return make_config(tmp_path, tmp_path_factory.getbasetemp() / "tiny")


@pytest.mark.parametrize("clip", [1e9, 0.01])
def test_each_step_descends_on_the_loss_plus_mu_half_the_squared_distance(clip: float) -> None:
    mu, lr = 0.7, 0.1
    xs = [torch.randn(9, H, dtype=torch.float64) for _ in range(3)]
    plain, proximal = OneLayer(), OneLayer()
    start = [p.detach().clone() for p in plain.model.parameters()]
    optimizer = torch.optim.SGD(plain.model.parameters(), lr=lr)
    stepper = Stepper(
        proximal,  # type: ignore[arg-type]
        torch.optim.SGD(proximal.model.parameters(), lr=lr),
        TrainConfig(prox=mu, clip=clip),
    )
    for x in xs:
        loss = plain.loss(x)
        pairs = zip(plain.model.parameters(), start, strict=True)
        whole = loss + mu / 2 * sum((p - old).square().sum() for p, old in pairs)
        whole.backward()
        torch.nn.utils.clip_grad_norm_(plain.model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        assert stepper.step(x) == pytest.approx(loss.item(), rel=1e-12)  # type: ignore[arg-type]
    for found, want in zip(proximal.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-12)
    for anchor, old in zip(stepper.anchors, start, strict=True):
        assert torch.equal(anchor, old)


def test_inv9_mu_0_changes_no_bit_and_mu_pulls_towards_the_global_model(config: Make, tmp_path: Path) -> None:
    def moved(*words: str) -> float:
        world = build_world(config("budgets=unlimited", *words).resolved(), Ranks(), NullObserver())
        state, _ = play_round(world, world.algorithm.init(world.params), NullObserver())
        return sum(float((state.params[k] - old).square().sum()) for k, old in world.params.items())

    free, off, held = moved(), moved("train.prox=0"), moved("train.prox=100", "train.clip=1e9")
    assert free == off
    assert held < free


def test_inv2_the_copy_is_part_of_predicted_and_measured_memory(config: Make, tmp_path: Path) -> None:
    peaks = {}
    for name, words in (("plain", []), ("prox", ["train.prox=0.1"])):
        tiers = "budgets=experts=25%;experts=100%"
        simulate.run(config(*words, tiers, "rounds=1", "train.batch_size=4", "train.trunk=fedavg", out_name=name))
        ledger = [json.loads(line) for line in (tmp_path / name / "ledger.jsonl").read_text().splitlines()]
        for entry in ledger:
            predicted, real = entry["predicted"]["memory_bytes"], entry["real"]["memory_bytes"]
            assert real <= predicted <= 1.10 * real, entry
        peaks[name] = [entry["real"]["memory_bytes"] for entry in ledger]
    world = build_world(config("rounds=1", "train.trunk=fedavg").resolved(), Ranks(), NullObserver())
    for client, (plain, prox) in enumerate(zip(peaks["plain"], peaks["prox"], strict=True)):
        experts = (4, 16)[client % 2]
        copy = 4 * (experts * (world.population.costs.expert_params + 32) + world.population.costs.trunk_trainable)
        assert abs(prox - plain - copy) < 0.02 * plain
