"""HFedMoE on adapters over experts in few bits: what moves, what is held, and costs that are foreseen (invariant 2)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_corpus import make_config

from fedmoe_core.algorithms.hfedmoe import HFedMoE
from fedmoe_core.config.run_config import Config
from fedmoe_core.layer.lora import FACTORS
from fedmoe_core.simulation import run as simulate
from fedmoe_core.simulation.observer import NullObserver
from fedmoe_core.simulation.prepare import build_world
from fedmoe_core.simulation.process_group import Ranks
from fedmoe_core.simulation.round import play_round

Make = Callable[..., Config]
LORA = ("train.experts=lora", "lora.rank=4", "model_config.expert_width=32")  # 32 must divide what is in few bits


@pytest.fixture
def config(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    return make_config(tmp_path, tmp_path_factory.getbasetemp() / "tiny")


def ledger(config: Config) -> list[dict]:
    return [json.loads(line) for line in (Path(config.out) / "ledger.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "words",
    [
        ("algorithm=hfedmoe", "budgets=memory=35%;memory=100%", "lora.frozen_format=int4"),
        ("algorithm=hfedmoe", "budgets=memory=35%;memory=100%", "lora.frozen_format=none"),
        (
            "algorithm=hfedmoe",
            "budgets=experts=25%;experts=75%",
            "lora.frozen_format=nf4",
            "selection.mode=backward-masked",
        ),
        ("algorithm=hfedmoe", "budgets=down=40%;flops=5.96e6", "lora.frozen_format=mxfp4"),
        ("algorithm=flame", "budgets=memory=100%", "lora.frozen_format=int8"),
        ("algorithm=most_activated", "budgets=memory=50%", "lora.frozen_format=nvfp4"),
    ],
    ids=["int4", "plain", "masked", "less traffic and work", "flame", "most activated"],
)
def test_inv2_real_costs_are_at_most_those_foreseen(config: Make, words: tuple[str, ...]) -> None:
    run = config(*words, *LORA)
    summary = simulate.run(run)
    assert summary["budget_violations"] == 0
    lines = ledger(run)
    assert lines
    for line in lines:
        foreseen, real = line["predicted"], line["real"]
        for name in ("memory_bytes", "bytes_down", "bytes_up", "flops"):
            assert real[name] <= foreseen[name], name
        if line["budget"]["flops"] is None:  # else one step, in which no optimizer state is there yet
            assert foreseen["memory_bytes"] <= 1.10 * real["memory_bytes"]
        assert foreseen["bytes_down"] == real["bytes_down"]
        assert foreseen["bytes_up"] == real["bytes_up"]


def test_a_layer_that_no_step_can_pay_only_runs_with_its_adapters(config: Make) -> None:
    run = config("algorithm=hfedmoe", "budgets=flops=5.96e6", "lora.frozen_format=mxfp4", *LORA).resolved()
    world = build_world(run, Ranks(), NullObserver())
    plan = world.algorithm.plan(world.algorithm.init(world.params), [0])[0]
    assert sorted(plan.trainable_LE.any(axis=1)) == [False, True]
    world.adapter.configure(world.params, plan.submodel(train_dense=False))
    idle = world.adapter.moe[int(plan.trainable_LE.any(axis=1).argmin())]
    assert idle.a_in_frozen is not None
    assert len(idle.a_in_frozen) == len(idle.experts)


def test_few_bits_let_a_client_hold_more_experts(config: Make) -> None:
    held = {}
    for form in ("none", "int4"):
        run = config("algorithm=hfedmoe", "budgets=memory=20%", f"lora.frozen_format={form}", *LORA)
        world = build_world(run.resolved(), Ranks(), NullObserver())
        held[form] = world.algorithm.plan(world.algorithm.init(world.params), [0])[0].counted_experts
    whole = config("algorithm=hfedmoe", "budgets=memory=20%", "model_config.expert_width=32")
    world = build_world(whole.resolved(), Ranks(), NullObserver())
    held["whole"] = world.algorithm.plan(world.algorithm.init(world.params), [0])[0].counted_experts
    assert held["whole"] < held["none"] < held["int4"]


def test_only_adapters_and_routers_move(config: Make) -> None:
    run = config("algorithm=hfedmoe", "budgets=experts=50%", "lora.frozen_format=int4", *LORA).resolved()
    world = build_world(run, Ranks(), NullObserver())
    state, round_ = play_round(world, world.algorithm.init(world.params), NullObserver())
    assert [update.error for update in round_.updates] == [""] * run.clients
    moved = {key.split(".")[-1] for key, old in world.params.items() if not torch.equal(old, state.params[key])}
    assert moved == {"router", *FACTORS}
    assert state.params["moe.0.a_in"].shape[1] == 4
    assert all(layer.w_in_frozen.dtype == torch.uint8 for layer in world.adapter.moe)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("algorithm=flux", "train.experts=lora"), "train.experts=lora is not for algorithm='flux'"),
        (("algorithm=flexlora", "train.experts=lora"), "train.experts=lora is not for algorithm='flexlora'"),
        (("algorithm=hfedmoe", "lora.frozen_format=int4"), "set train.experts=lora, or frozen_format=none"),
        (("algorithm=flexlora", "lora.frozen_format=int4"), "set train.experts=lora, or frozen_format=none"),
    ],
)
def test_systems_that_train_whole_experts_refuse_by_name(config: Make, words: tuple[str, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build_world(config(*words).resolved(), Ranks(), NullObserver())


def test_choices_per_batch_and_widths_that_do_not_fit_are_refused(config: Make) -> None:
    per_batch = ("selection.mode=backward-masked", "selection.reschedule=batch", "selection.score=s")
    with pytest.raises(ValueError, match=r"train.experts=lora lays experts out once a round"):
        config("algorithm=hfedmoe", *per_batch, *LORA)
    narrow = ("train.experts=lora", "lora.frozen_format=int4", "model_config.expert_width=24")
    with pytest.raises(ValueError, match="int4 needs widths that 32 divides, not 24"):
        build_world(config("algorithm=hfedmoe", *narrow).resolved(), Ranks(), NullObserver())


def test_the_label_names_rank_and_bits(config: Make) -> None:
    assert HFedMoE.label(config(*LORA, "lora.frozen_format=nf4")) == "HFedMoE (score ib, rank 4 over nf4)"
    assert HFedMoE.label(config()) == "HFedMoE (score ib)"
