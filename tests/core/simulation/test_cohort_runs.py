"""Clients that train at once: as each would alone, inside what memory holds, the same on any number of ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from tiny_corpus import make_config
from tiny_runs import fedmoe

from fedmoe_core.client.cohort.train import Member, train_cohort
from fedmoe_core.config.run_config import Config
from fedmoe_core.layer.moe import MoE
from fedmoe_core.layer.recording import Tape
from fedmoe_core.messages.plan import ExpertPlan, ProbeContext
from fedmoe_core.messages.result import LocalFailure, LocalResult
from fedmoe_core.model.cohort import CohortAdapter
from fedmoe_core.reporting.page import render
from fedmoe_core.reporting.results import line
from fedmoe_core.reporting.run import read_runs
from fedmoe_core.server.planning import asked_costs
from fedmoe_core.server.state import ServerState
from fedmoe_core.simulation import run as simulate
from fedmoe_core.simulation.cohorts import training
from fedmoe_core.simulation.cohorts.drawing import round_batches
from fedmoe_core.simulation.cohorts.grouping import grouped
from fedmoe_core.simulation.observer import NullObserver, groups_of
from fedmoe_core.simulation.prepare import build_world
from fedmoe_core.simulation.process_group import Ranks
from fedmoe_core.simulation.round import Round, play_round
from fedmoe_core.simulation.world import World

Make = Callable[..., Config]
BUDGETS = "budgets=['experts=25%', 'experts=50%', 'unlimited']"


@pytest.fixture
def config(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    return make_config(tmp_path, tmp_path_factory.getbasetemp() / "tiny")


def played(config: Config) -> tuple[World, ServerState, Round]:
    world = build_world(config.resolved(), Ranks(), NullObserver())
    state, round_ = play_round(world, world.algorithm.init(world.params), NullObserver())
    return world, state, round_


def trained(world: World, plans: list[ExpertPlan]) -> list[LocalResult | LocalFailure]:
    members = [
        Member(
            plan,
            asked_costs(world.population, plan.extras),
            partial(round_batches, world, plan),
            validation=partial(training.held_out, world, plan.client),
        )
        for plan in plans
    ]
    train = training.round_settings(world, 0)
    return list(train_cohort(cast(CohortAdapter, world.adapter), world.params, members, train=train).results)


def planned(config: Config) -> tuple[World, list[ExpertPlan]]:
    world = build_world(config.resolved(), Ranks(), NullObserver())
    return world, world.algorithm.plan(world.algorithm.init(world.params), range(config.clients))


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], *, within: float = 1e-4) -> None:
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert (found[key].double() - value.double()).norm() <= within * value.double().norm(), key


# What a system asks of its clients besides training: auxiliary losses, validation, probes before and after.
ASKING = {
    "fft_moe": ("algorithm=fft_moe", "budgets=unlimited", "fft_moe.balance=0.1"),
    "fedmoe": ("algorithm=fedmoe", "fedmoe.balance=0.1", BUDGETS),
    "hetlora": ("algorithm=hetlora", "budgets=unlimited", "lora.tail=0.1"),
    "flex_moe": ("algorithm=flex_moe", BUDGETS),
    "flux": ("algorithm=flux", BUDGETS),
    "toy": ("algorithm=toy:Toy", "budgets=unlimited"),
}


@pytest.mark.parametrize(
    "words",
    [
        ("algorithm=hfedmoe",),
        ("algorithm=hfedmoe_plus", "train.prox=0.1", "train.clip=0.05"),
        (
            "algorithm=hfedmoe",
            "train.experts=lora",
            "lora.rank=4",
            "lora.frozen_format=nf4",
            "model_config.expert_width=32",
        ),
        ("algorithm=flame", "budgets=unlimited"),
        ("algorithm=flexlora", "budgets=unlimited", "train.label_smoothing=0.1"),
        *ASKING.values(),
    ],
    ids=lambda words: " ".join(words),
)
def test_a_cohort_gives_what_its_clients_give_alone(config: Make, words: tuple[str, ...]) -> None:
    world, alone, one_by_one = played(config(BUDGETS, *words))
    _, together, round_ = played(config(BUDGETS, *words, "cohort.clients=4"))
    assert [record["clients"] for record in round_.cohorts] == [[0, 1, 2, 3]]
    moved = 0
    for key, old in world.params.items():
        change = (alone.params[key] - old).norm()
        if change > 0:
            moved += 1
            assert (alone.params[key] - together.params[key]).norm() < 1e-4 * change, key
    assert moved
    for one, other in zip(one_by_one.updates, round_.updates, strict=True):
        assert (one.status, other.status, one.cohort, other.cohort) == ("ok", "ok", 1, 4)
        assert (one.alone, other.alone) == ("", "")
        for resource in ("flops", "bytes_down", "bytes_up", "experts"):
            assert getattr(one.cost, resource) == getattr(other.cost, resource), resource
        assert other.loss_last == pytest.approx(one.loss_last, rel=1e-4)
        assert one.profile is not None
        assert other.profile is not None
        same(other.private, one.private, within=1e-3)  # Flux's estimates are small differences of losses
        if one.validation is not None:
            assert other.validation is not None
            assert other.validation.loss_sum == pytest.approx(one.validation.loss_sum, rel=1e-5)
            assert (other.validation.count, other.validation.correct) == (one.validation.count, one.validation.correct)
            np.testing.assert_array_equal(other.validation_profile.rows_LE, one.validation_profile.rows_LE)
        for name, value in vars(one.profile).items():
            np.testing.assert_allclose(getattr(other.profile, name), value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("algorithm", ["hfedmoe", "fedmoe", "flex_moe", "flux"])
def test_classes_have_a_head_for_each_client(config: Make, algorithm: str) -> None:
    words = ("train.trunk=frozen", "train.token_dropout=0.3", "train.logit_adjustment=1.0", "budgets=unlimited")
    words = (f"algorithm={algorithm}", *words)
    world, alone, one_by_one = played(config(*words, labeled=True))
    _, together, round_ = played(config(*words, "cohort.clients=3", labeled=True))
    assert [len(record["clients"]) for record in round_.cohorts] == [3]
    for key in ("dense.score.weight", "moe.0.w_in"):
        change = (alone.params[key] - world.params[key]).norm()
        assert (alone.params[key] - together.params[key]).norm() < 1e-4 * change, key
    for one, other in zip(one_by_one.updates, round_.updates, strict=True):
        same(other.private, one.private, within=1e-3)  # Flux's estimates are small differences of losses
        if one.validation is not None and other.validation is not None:
            assert other.validation.loss_sum == pytest.approx(one.validation.loss_sum, rel=1e-5)
            assert other.validation.correct == one.validation.correct
        assert (other.validation is None) == (one.validation is None) == (algorithm != "fedmoe")


def test_the_prediction_holds_and_is_near(config: Make) -> None:
    for labeled in (False, True):
        frozen = ("train.trunk=frozen",) if labeled else ()
        for clients in (2, 3):
            words = (*frozen, f"clients={clients}", "clients_per_round=0", f"cohort.clients={clients}", BUDGETS)
            _, _, round_ = played(config(*words, labeled=labeled))
            (record,) = round_.cohorts
            assert record["memory_bytes"] <= record["predicted_bytes"] <= 1.10 * record["memory_bytes"], (words, record)


# Adapters that weigh more than the trunk, whose gradients an auxiliary loss makes early.
LARGE = (*ASKING["hetlora"], "lora.rank=64", "train.seq_len=4", "model_config.expert_width=64", "warmup.steps=0")


@pytest.mark.parametrize("asked", [*ASKING.values(), LARGE], ids=[*ASKING, "hetlora of rank 64"])
def test_the_prediction_holds_with_what_systems_ask(config: Make, asked: tuple[str, ...]) -> None:
    for clients in (2, 4):
        words = (f"clients={clients}", "clients_per_round=0", f"cohort.clients={clients}", *asked)
        _, _, round_ = played(config(*words))
        (record,) = round_.cohorts
        assert record["memory_bytes"] <= record["predicted_bytes"] <= 1.10 * record["memory_bytes"], (words, record)


@pytest.mark.parametrize("name", ["fedmoe", "flex_moe"])
def test_inv10_what_systems_ask_has_the_same_bits_on_two_ranks(config: Make, name: str, tmp_path: Path) -> None:
    words = ("cohort.clients=2", "eval.personal=true", *ASKING[name])
    whole = simulate.run(config(*words, out_name="whole"))
    (written := tmp_path / "cohorts.toml").write_text(config(*words).to_toml())
    ended = fedmoe("simulate", written, "ranks=2", f"out={tmp_path / 'ranks'}", "--quiet")
    assert ended.returncode == 0, ended.stderr
    summary = json.loads((tmp_path / "ranks" / "summary.json").read_text())
    assert summary["model_hash"] == whole["model_hash"]
    assert summary["clients_in_cohorts"] == 8

    def own_losses(run: Path) -> list[list[float]]:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [line["personal_loss_C"] for line in lines if "personal_loss_C" in line]

    assert own_losses(tmp_path / "ranks") == own_losses(tmp_path / "whole")
    assert len(own_losses(tmp_path / "whole")) == 3


def test_inv10_the_bits_are_those_of_any_number_of_ranks_and_of_a_resumed_run(config: Make, tmp_path: Path) -> None:
    words = ("cohort.clients=2", BUDGETS)
    whole = simulate.run(config(*words, out_name="whole"))

    class Stop(NullObserver):
        def on_round(self, round: int, rounds: int, record: Any) -> None:
            if round == 1:
                raise KeyboardInterrupt

    stopped = config(*words, out_name="stopped")
    with pytest.raises(KeyboardInterrupt):
        simulate.run(stopped, observer=Stop())
    assert simulate.resume(Path(stopped.out))["model_hash"] == whole["model_hash"]
    (Path(whole_toml := tmp_path / "cohorts.toml")).write_text(config(*words).to_toml())
    for ranks in (2, 4):
        out = tmp_path / f"ranks-{ranks}"
        ended = fedmoe("simulate", whole_toml, f"ranks={ranks}", f"out={out}", "--quiet")
        assert ended.returncode == 0, ended.stderr
        assert json.loads((out / "summary.json").read_text())["model_hash"] == whole["model_hash"]
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert [line["cohorts"][1]["clients"] for line in lines if "cohorts" in line] == [[2, 3], [2, 3]]


@pytest.mark.parametrize("words", [("algorithm=hfedmoe",), ASKING["fedmoe"], ASKING["flex_moe"], ASKING["flux"]])
def test_one_clients_nan_is_its_own(config: Make, words: tuple[str, ...]) -> None:
    world, plans = planned(config("cohort.clients=4", BUDGETS, *words))
    well = trained(world, plans)
    expert = int(plans[1].permitted_LE[0].nonzero()[0][0])
    rows = {"moe.0.w_out": {expert: torch.full_like(world.params["moe.0.w_out"][0], torch.nan)}}
    plans[1] = replace(plans[1], extras=replace(plans[1].extras, rows={**plans[1].extras.rows, **rows}))
    ill = trained(world, plans)
    assert isinstance(ill[1], LocalFailure)
    assert ill[1].error == "the loss became nan at local step 1"
    for client in (0, 2, 3):
        one, other = well[client], ill[client]
        assert isinstance(one, LocalResult)
        assert isinstance(other, LocalResult)
        for wanted, found in ((one.deltas, other.deltas), (one.kept, other.kept)):
            same(found, wanted)
        same(other.probed, one.probed, within=1e-3)
        assert (one.validation is None) == (other.validation is None)
        # A backward with a NaN in it would have left no importance for any of them.
        np.testing.assert_allclose(other.profile.taylor_abs_LE, one.profile.taylor_abs_LE, rtol=1e-3, atol=1e-6)


def test_a_probe_that_raises_ends_the_round_of_its_client_alone(config: Make) -> None:
    world, plans = planned(config("cohort.clients=4", *ASKING["flex_moe"]))
    well = trained(world, plans)

    def fails(_: ProbeContext) -> dict[str, torch.Tensor]:
        raise ValueError("no room for a thought")

    plans[1] = replace(plans[1], extras=replace(plans[1].extras, after=fails))
    ill = trained(world, plans)
    assert isinstance(ill[1], LocalFailure)
    assert ill[1].error == "ValueError: no room for a thought"
    assert ill[1].cost.flops == well[1].cost.flops
    for client in (0, 2, 3):
        one, other = well[client], ill[client]
        assert isinstance(one, LocalResult)
        assert isinstance(other, LocalResult)
        same(other.probed, one.probed, within=1e-3)
        assert one.cost.memory_bytes == other.cost.memory_bytes


def test_a_loss_that_reads_more_than_a_cohort_has_is_told(config: Make) -> None:
    @dataclass(frozen=True)
    class Weights:
        tables: int = 1

        def __call__(self, tape: Tape) -> torch.Tensor:
            return cast(MoE, tape.layers[0]).w_in.square().sum()

    world, plans = planned(config("cohort.clients=4", BUDGETS))
    plans = [replace(plan, extras=replace(plan.extras, aux=Weights())) for plan in plans]
    with pytest.raises(
        ValueError, match=r"an auxiliary loss reads what a client of a cohort has not \(.*w_in.*\); read"
    ):
        trained(world, plans)


def test_a_joint_step_that_raises_is_made_up_for_one_by_one(config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    _, alone, _ = played(config(BUDGETS))

    def out_of_memory(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory\nand a page of advice")

    monkeypatch.setattr(training, "train_cohort", out_of_memory)
    _, state, round_ = played(config(BUDGETS, "cohort.clients=4"))
    assert {u.alone for u in round_.updates} == {"its cohort's step raised RuntimeError: out of memory"}
    assert round_.cohorts == []
    assert all(torch.equal(state.params[key], value) for key, value in alone.params.items())


def test_it_is_said_why_a_client_trains_alone(config: Make) -> None:
    def reasons(*words: str, labeled: bool = False) -> list[str]:
        _, _, round_ = played(config(*words, labeled=labeled))
        return [update.alone for update in round_.updates]

    assert reasons("cohort.clients=4", labeled=True) == ["its trunk trains"] * 3
    batch = ("selection.mode=backward-masked", "selection.reschedule=batch", "selection.score=s", "budgets=experts=25%")
    assert set(reasons("cohort.clients=4", *batch)) == {"it chooses experts for every batch"}
    assert reasons("cohort.clients=4", "clients=1") == ["no other client of its kind in the round"]


def test_memory_decides_how_many(config: Make) -> None:
    world = build_world(config("cohort.clients=0", BUDGETS).resolved(), Ranks(), NullObserver())
    plans = world.algorithm.plan(world.algorithm.init(world.params), range(4))
    (whole,) = grouped(world, plans)
    assert len(whole.plans) == 4

    def at(memory: str) -> World:
        return replace(world, config=replace(world.config, cohort=replace(world.config.cohort, memory=memory)))

    limit = max(plan.predicted.memory_bytes for plan in plans)
    seen = set()
    for memory in range(limit, whole.predicted_bytes + limit, limit // 4):
        groups = grouped(at(f"{memory}B"), plans)
        assert [plan.client for group in groups for plan in group.plans] == [0, 1, 2, 3]
        assert all(group.predicted_bytes <= memory for group in groups)
        seen.add(tuple(len(group.plans) for group in groups))
        assert {group.alone for group in groups if len(group.plans) == 1} <= {"memory holds no second client"}
    assert {(1, 1, 1, 1), (2, 2), (4,)} <= seen
    three = replace(world, config=replace(world.config, cohort=replace(world.config.cohort, clients=3)))
    assert [len(group.plans) for group in grouped(three, plans)] == [2, 2]
    assert [group.alone for group in grouped(three, plans[:1])] == ["no other client of its kind in the round"]
    two = replace(world, config=replace(world.config, cohort=replace(world.config.cohort, clients=2)))
    assert [group.alone for group in grouped(two, plans[:3])] == ["the cohorts of its kind are full", ""]
    with pytest.raises(ValueError, match=r"cohort\.memory=1kB is .*, and client 0 alone needs .*; raise it, or set"):
        grouped(at("1kB"), plans)


def test_a_dry_run_has_the_groups_of_the_first_round(config: Make) -> None:
    made = config("cohort.clients=2", "clients_per_round=3", BUDGETS)
    rows = simulate.dry_run(made)
    _, _, round_ = played(made)
    trained = {update.client: update for update in round_.updates}
    assert {place for place, row in enumerate(rows) if row.group} == set(trained)
    found = groups_of(rows)
    assert [len(group.clients) for group in found] == [1, 2]
    assert [group.alone for group in found] == ["the cohorts of its kind are full", ""]
    (record,) = round_.cohorts
    assert found[1].predicted_bytes == record["predicted_bytes"]
    assert found[1].clients == tuple(rows[client].client for client in record["clients"])
    assert groups_of(simulate.dry_run(config(BUDGETS))) == []
    with pytest.raises(ValueError, match="alone needs"):
        simulate.dry_run(config("cohort.clients=2", "cohort.memory=1kB"))


def test_a_limit_that_holds_nobody_is_refused_before_anything_trains(config: Make) -> None:
    made = config("cohort.clients=0", "cohort.memory=1kB")
    with pytest.raises(ValueError, match="alone needs"):
        simulate.run(made)
    assert not (Path(made.out) / "metrics.jsonl").exists()
    with pytest.raises(ValueError, match=r"cohort\.memory='plenty' is not a size; give one such as 4GiB, or auto"):
        config("cohort.memory=plenty")


def test_the_records_and_the_report_say_how_clients_ran(config: Make) -> None:
    made = config("cohort.clients=2", "clients=3", BUDGETS, "rounds=1")
    summary = simulate.run(made)
    full = {"the cohorts of its kind are full": 1}
    assert (summary["clients_in_cohorts"], summary["cohorts"], summary["clients_alone"]) == (2, 1, full)
    said = "2 client rounds in 1 cohort, 1 alone (the cohorts of its kind are full)"
    (run,) = read_runs([Path(made.out)])
    assert said in line(run)
    assert said in render([run])
    ledger = [json.loads(text) for text in (Path(made.out) / "ledger.jsonl").read_text().splitlines()]
    assert [entry.get("cohort") for entry in ledger] == [None, 2, 2]
    lines = [json.loads(text) for text in (Path(made.out) / "metrics.jsonl").read_text().splitlines()]
    answered = [entry for entry in lines if entry["type"] == "client"]
    assert [entry["cohort"] for entry in answered] == [1, 2, 2]
    plain = config("clients=3", "rounds=1", out_name="plain")
    simulate.run(plain)
    assert "cohort" not in (Path(plain.out) / "metrics.jsonl").read_text()
    assert "client rounds in" not in line(read_runs([Path(plain.out)])[0])
