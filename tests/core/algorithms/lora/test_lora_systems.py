"""FFT-MoE, FLAME, HetLoRA and FlexLoRA alike: budgets, failures, resuming, where they start and where they end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_runs import TIERS, Make, started
from tiny_corpus import make_config

from fedmoe_core.messages.plan import ExpertPlan
from fedmoe_core.messages.result import LocalFailure
from fedmoe_core.simulation import run as simulate
from fedmoe_core.simulation.cohorts import training
from fedmoe_core.simulation.evaluation import evaluate_clients
from fedmoe_core.simulation.observer import NullObserver
from fedmoe_core.simulation.round import play_round

SYSTEMS = ("fft_moe", "flame", "hetlora", "flexlora")


@pytest.fixture
def config(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    return make_config(tmp_path, tmp_path_factory.getbasetemp() / "tiny")


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_starts_at_the_warm_model(config: Make, name: str) -> None:
    world, state = started(config, name, "budgets=unlimited")
    plain, before = started(config, "fedavg", "budgets=unlimited")
    assert evaluate_clients(world, state).loss_C == evaluate_clients(plain, before).loss_C


@pytest.mark.parametrize(
    ("name", "wanted"), [("fft_moe", 0.97887), ("flame", 0.71385), ("hetlora", 0.71562), ("flexlora", 0.71524)]
)
def test_three_rounds_end_where_they_always_did(config: Make, name: str, wanted: float) -> None:
    words = (f"algorithm={name}", "budgets=unlimited", "rounds=3", "eval.every=3", "eval.personal=true")
    summary = simulate.run(config(*words, labeled=True))
    assert summary["loss_before"] == pytest.approx(1.10616, abs=1e-3)
    assert summary["loss_after"] == pytest.approx(wanted, abs=1e-3)
    assert summary["budgeted"]


@pytest.mark.parametrize("name", SYSTEMS)
def test_inv1_inv2_what_a_client_cannot_bear_is_charged_and_named(config: Make, name: str, tmp_path: Path) -> None:
    summary = simulate.run(config(f"algorithm={name}", TIERS, "rounds=3"))
    assert summary["refused_updates"] == 0
    assert summary["loss_after"] < summary["loss_before"]
    assert not summary["budgeted"]
    over = ["client 0: experts: 16 used, 4 allowed", "client 1: experts: 16 used, 8 allowed"]
    if name == "fft_moe":  # the grafted experts are held beside the original ones
        over = [f"client {c}: experts: 24 used, {allowed} allowed" for c, allowed in enumerate((4, 8, 16))]
    assert [line.replace(" experts", "") for line in summary["over_budget"]] == [
        line.replace(" experts", "") for line in over
    ]
    for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines():
        predicted, real = json.loads(line)["predicted"], json.loads(line)["real"]
        assert real["memory_bytes"] <= predicted["memory_bytes"] <= 1.10 * real["memory_bytes"]
        assert real["flops"] <= predicted["flops"]
        assert (real["bytes_up"], real["bytes_down"]) == (predicted["bytes_up"], predicted["bytes_down"])


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_memory_and_flop_budget_that_holds_the_model_is_kept(config: Make, name: str) -> None:
    world, state = started(config, name, "budgets=unlimited")
    whole = world.algorithm.plan(state, [0])[0].predicted
    limit = f"budgets=memory={whole.memory_bytes},flops={0.85 * whole.flops}"
    summary = simulate.run(config(f"algorithm={name}", limit))
    assert summary["budgeted"]
    assert summary["budget_violations"] == summary["refused_updates"] == 0
    assert summary["over_budget"] == []


@pytest.mark.parametrize("name", SYSTEMS)
def test_inv10_three_rounds_resume_to_the_same_bits(config: Make, name: str, tmp_path: Path) -> None:
    words = (f"algorithm={name}", TIERS, "rounds=3", "eval.every=3", "clients_per_round=3")
    whole = simulate.run(config(*words, out_name="whole"))

    class Stop(NullObserver):
        def on_round(self, round: int, rounds: int, record: Any) -> None:
            if round == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate.run(config(*words, out_name="cut"), observer=Stop())
    assert simulate.resume(tmp_path / "cut")["model_hash"] == whole["model_hash"]


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_failed_client_changes_nothing_and_is_survived(
    config: Make, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, state = started(config, name, "budgets=unlimited", labeled=True)
    train = training.train_client

    def failing(adapter: Any, params: Any, plan: ExpertPlan, *args: Any, **words: Any) -> Any:
        result = train(adapter, params, plan, *args, **words)
        return LocalFailure(result.cost, "gone") if plan.client == 1 else result

    monkeypatch.setattr(training, "train_client", failing)
    after, played = play_round(world, state, NullObserver())
    assert [update.status for update in played.updates] == ["ok", "failed", "ok"]
    assert not any(key.endswith("/1") for key in after.memory)
    assert all(torch.isfinite(tensor).all() for tensor in after.params.values())


@pytest.mark.parametrize("name", SYSTEMS)
def test_who_else_is_planned_changes_no_plan(config: Make, name: str) -> None:
    world, state = started(config, name, TIERS)
    state, _ = play_round(world, state, NullObserver())
    alone = [world.algorithm.plan(state, [client])[0] for client in (3, 0)]
    among = world.algorithm.plan(state, [0, 1, 2, 3])
    for one, other in zip(alone, (among[3], among[0]), strict=True):
        assert (one.predicted, one.top_k, one.extras.lora_rank, one.extras.out_scale_L, one.seed) == (
            other.predicted, other.top_k, other.extras.lora_rank, other.extras.out_scale_L, other.seed,
        )  # fmt: skip


def test_sizes_follow_the_clients_share_of_experts(config: Make) -> None:
    for name, wanted in (("fft_moe", [1, 1, 2, 2]), ("flame", [1, 1, 2, 2])):
        world, state = started(config, name, TIERS)
        assert [plan.top_k for plan in world.algorithm.plan(state, range(4))] == wanted
    for name in ("hetlora", "flexlora"):
        world, state = started(config, name, TIERS)
        assert [plan.extras.lora_rank for plan in world.algorithm.plan(state, range(4))] == [2, 4, 8, 8]
