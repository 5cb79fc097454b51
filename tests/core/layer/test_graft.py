"""Grafted mixtures: identity at first, the only thing that trains, masked like the block beside them, and paid for."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_corpus import make_config

from fedmoe_core.algorithms import base as algorithms
from fedmoe_core.algorithms.base import Algorithm, NextModel
from fedmoe_core.config.run_config import Config
from fedmoe_core.data.batches import Batch
from fedmoe_core.layer.graft import GraftSpec
from fedmoe_core.layer.router_loss import SwitchBalance
from fedmoe_core.messages.plan import ExpertPlan, Extras
from fedmoe_core.messages.result import LocalResult
from fedmoe_core.messages.update import ClientUpdate, Weights
from fedmoe_core.server.means import Sums, modular_mean
from fedmoe_core.server.planning import plan_of_masks
from fedmoe_core.server.state import ServerState
from fedmoe_core.simulation import run as simulate
from fedmoe_core.simulation.evaluation import evaluate_clients
from fedmoe_core.simulation.observer import NullObserver
from fedmoe_core.simulation.prepare import build_world
from fedmoe_core.simulation.process_group import Ranks
from fedmoe_core.simulation.round import play_round
from fedmoe_core.simulation.world import World

Make = Callable[..., Config]
M, WIDTH, TOP_K = 4, 8, 2


@dataclass(frozen=True)
class ToyGraft(Algorithm):
    """Everybody trains the whole mixture, with k falling from client to client."""

    trains_trunk = False

    @classmethod
    def graft(cls, config: Config) -> GraftSpec | None:
        return GraftSpec(M, WIDTH, TOP_K)

    def plan(self, state: ServerState, clients: Sequence[int]) -> list[ExpertPlan]:
        all_LE = np.ones((self.population.spec.num_layers, M), dtype=bool)
        extras = Extras(aux=SwitchBalance(0.01))
        return [
            plan_of_masks(self.population, state, client, all_LE, top_k=TOP_K - client % 2, extras=extras)
            for client in clients
        ]

    def client(self, plan: ExpertPlan, result: LocalResult) -> Weights:
        samples = self.population.sample_weight(plan.client)
        weight_LE = np.full(plan.trainable_LE.shape, samples)
        return Weights(
            experts_LE=weight_LE,
            routers_LE=weight_LE,
            gate=samples,
        )

    def apply(self, state: ServerState, sums: Sums, updates: Sequence[ClientUpdate]) -> NextModel:
        params = modular_mean(sums, state.params, "fedavg")
        return params, None


@pytest.fixture
def config(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Make:
    monkeypatch.setattr(algorithms, "PLACES", {**algorithms.PLACES, "random": "test_graft:ToyGraft"})
    return make_config(tmp_path, tmp_path_factory.getbasetemp() / "tiny")


def grafted(config: Make, *overrides: str, **words: Any) -> Config:
    return config("algorithm=random", "budgets=unlimited", *overrides, **words)


def world_of(config: Config) -> World:
    return build_world(config.resolved(), Ranks(), NullObserver())


@pytest.mark.parametrize("labeled", [False, True])
def test_a_graft_starts_at_identity(config: Make, labeled: bool) -> None:
    plain = world_of(config("algorithm=fedavg", "budgets=unlimited", labeled=labeled))
    world = world_of(grafted(config, labeled=labeled))
    before = evaluate_clients(plain, plain.algorithm.init(plain.params))
    after = evaluate_clients(world, world.algorithm.init(world.params))
    assert (after.loss, after.loss_C) == (before.loss, before.loss_C)
    spec = world.adapter.spec
    assert (spec.num_experts, spec.top_k, spec.intermediate_size, spec.activation) == (M, TOP_K, WIDTH, "relu")
    assert world.params["moe.0.w_in"].shape == (M, WIDTH, 32)
    assert not world.params["moe.0.w_out"].any()
    frozen = {s.key for s in spec.params if s.kind == "frozen"}
    assert len(frozen) == 3 * spec.num_layers
    assert all(".base." in key for key in frozen)


@pytest.mark.parametrize("trunk", ["frozen", "fedavg"])
def test_nothing_but_the_mixture_and_a_head_ever_moves(config: Make, trunk: str) -> None:
    world = world_of(grafted(config, f"train.trunk={trunk}", labeled=True))
    state = world.algorithm.init(world.params)
    for _ in range(2):
        state, round_ = play_round(world, state, NullObserver())
        assert [update.error for update in round_.updates] == [""] * 3
    moved = {key for key, old in world.params.items() if not torch.equal(old, state.params[key])}
    mixture = {f"moe.{n}.{name}" for n in range(world.adapter.spec.num_layers) for name in ("router", "w_in", "w_out")}
    assert moved == {*mixture, "dense.score.weight"}


def test_padding_is_no_row_of_the_mixture_either(config: Make) -> None:
    world = world_of(grafted(config))
    world.adapter.configure(world.params)
    tokens_SN = torch.randint(0, 300, (3, 12), generator=torch.Generator().manual_seed(0))
    mask_SN = torch.arange(12)[None] < torch.tensor([[12], [5], [7]])
    world.adapter.loss(Batch(tokens_SN, mask_SN)).backward()
    for layer in world.adapter.moe:
        assert float(layer.last_stats.tokens) == 24
        assert float(layer.scores.rows_B.sum()) == 24 * TOP_K
    for layer in world.adapter.frozen_moe:
        assert layer.last_stats is None
        assert all(parameter.grad is None for parameter in layer.parameters())


def test_inv1_inv2_the_frozen_blocks_are_charged_and_memory_is_bounded(config: Make, tmp_path: Path) -> None:
    simulate.run(grafted(config, "train.batch_size=4"))
    ledger = [json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
    for entry in ledger:
        predicted, real = entry["predicted"], entry["real"]
        assert real["memory_bytes"] <= predicted["memory_bytes"] <= 1.10 * real["memory_bytes"], entry
        assert real["flops"] <= predicted["flops"]
        assert (real["bytes_up"], real["bytes_down"]) == (predicted["bytes_up"], predicted["bytes_down"])
        assert real["experts"] == predicted["experts"] == 16 + 2 * M  # the blocks are resident all the same
    world = world_of(grafted(config))
    plain = world_of(config("algorithm=fedavg", "budgets=unlimited"))
    base = 2 * 2 * 3 * 32 * 16  # layers x top-k x parameters of an expert
    counted, alone = world.population.costs.trunk, plain.population.costs.trunk
    assert counted.forward_flops_per_token == alone.forward_flops_per_token + 2 * base + 2 * 2 * 8 * 32
    assert counted.flops_per_token >= alone.flops_per_token + 4 * base
    first, second = ledger[0]["real"]["bytes_down"], ledger[4]["real"]["bytes_down"]
    whole = sum(t.nbytes for key, t in world.params.items() if not key.startswith("moe."))
    assert first - second == whole  # the trunk, frozen blocks and all, travels once


def test_inv10_a_grafted_run_resumes_to_the_same_bits(config: Make, tmp_path: Path) -> None:
    whole = simulate.run(grafted(config, out_name="whole"))

    class Stop(NullObserver):
        def on_round(self, round: int, rounds: int, record: Any) -> None:
            if round == 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate.run(grafted(config, out_name="cut"), observer=Stop())
    resumed = simulate.resume(tmp_path / "cut")
    assert resumed["model_hash"] == whole["model_hash"]
    assert whole["loss_after"] != whole["loss_before"]


def test_an_expert_budget_counts_the_resident_blocks(config: Make) -> None:
    with pytest.raises(ValueError, match=r"client 0: the plan exceeds its budget \(experts: 24 experts used"):
        simulate.run(config("algorithm=random", "budgets=experts=100%"))


@pytest.mark.parametrize(("experts", "width", "top_k"), [(4, 8, 5), (4, 0, 2), (0, 8, 0)])
def test_a_graft_that_is_no_mixture_is_refused(experts: int, width: int, top_k: int) -> None:
    with pytest.raises(ValueError, match="cannot graft a mixture"):
        GraftSpec(experts, width, top_k)


def test_a_model_is_grafted_once(config: Make) -> None:
    world = world_of(grafted(config))
    with pytest.raises(ValueError, match="load it again"):
        world.adapter.graft(GraftSpec(M, WIDTH, TOP_K), seed=0)
    with pytest.raises(ValueError, match="grafted"):
        world.adapter.export()
