"""Flux: roles and merged slots as wired, profiles one round stale, budgets that hold, and whole runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hand_made import SAMPLES, TRAINED, WEIGHTS, model, plan_for, play, population, profiles, result_for, spread
from tiny_corpus import make_config

from fedmoe_core.algorithms.flux.clustering import expert_features
from fedmoe_core.algorithms.flux.flux import Flux, Profile, utilities
from fedmoe_core.algorithms.flux.forward_gradients import ForwardEstimates
from fedmoe_core.algorithms.flux.four_bit_profile import QuantizedProfile, profile_cost
from fedmoe_core.algorithms.flux.merging import (
    Merge,
    merge_budgets,
    merge_shares,
    merged_experts,
    merged_rows,
    plan_merge,
)
from fedmoe_core.budget.limits import Budget, Cost
from fedmoe_core.client.profiling import run_probe
from fedmoe_core.config.run_config import Config
from fedmoe_core.data.batches import client_batches
from fedmoe_core.layer.recording import recording
from fedmoe_core.messages.plan import ExpertPlan, Extras, ProbeContext
from fedmoe_core.messages.result import LocalFailure
from fedmoe_core.server.accumulator import Accumulator
from fedmoe_core.simulation import run as simulate
from fedmoe_core.simulation.observer import NullObserver
from fedmoe_core.simulation.prepare import build_world
from fedmoe_core.simulation.process_group import Ranks
from fedmoe_core.simulation.round import play_round
from fedmoe_core.simulation.world import World

TIERS = 'budgets=["experts=25%", "memory=800KiB", "unlimited"]'


@pytest.fixture
def config(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Config]:
    make = make_config(tmp_path, tmp_path_factory.getbasetemp() / "tiny")
    small = ("algorithm=flux", "model_config.expert_width=32", "clients=3", "train.local_steps=2", "flux.probes=1")
    return lambda *overrides, out="run": make(*small, *overrides, out_name=out)


def world_of(config: Config) -> World:
    return build_world(config.resolved(), Ranks(), NullObserver())


def lines(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def test_eq3_by_loops_and_frequency_before_any_gradient() -> None:
    rng = np.random.default_rng(0)
    freq_LE, grad_LE = rng.uniform(0.1, 1, (2, 4)), rng.uniform(1, 2, (2, 4))
    grad_LE[0, 1] = grad_LE[1, 3] = -1
    found_LE = utilities(Profile(freq_LE, np.ones((2, 4)), grad_LE))
    measured = [place for place in np.ndindex(2, 4) if grad_LE[place] >= 0]
    usual = sum(freq_LE[p] * grad_LE[p] for p in measured) / sum(freq_LE[p] for p in measured)
    for place in np.ndindex(2, 4):
        assert found_LE[place] == pytest.approx(freq_LE[place] * (grad_LE[place] if place in measured else usual))
    unknown = Profile(freq_LE, np.ones((2, 4)), np.full((2, 4), -1.0))
    np.testing.assert_allclose(utilities(unknown), freq_LE / freq_LE.sum())


def test_only_trained_experts_are_averaged_by_data_volume() -> None:
    algorithm = Flux(population())
    after, updates = play(algorithm)
    for key, old in model().items():
        if not key.startswith("moe."):
            continue
        layer, wanted = int(key.split(".")[1]), old.numpy().copy()
        for expert in range(len(wanted)):
            users = [c for c in range(3) if TRAINED[c][layer, expert]]
            if not key.endswith("router"):
                users = [c for c in users if profiles()[c].rows_LE[layer, expert] > 0]
            if users:
                total = sum(SAMPLES[c] for c in users)
                wanted[expert] += sum(SAMPLES[c] * spread(c, key)[expert] for c in users) / total
        np.testing.assert_allclose(after.params[key].numpy(), wanted, rtol=0, atol=1e-6, err_msg=key)
    for client, update in enumerate(updates):
        profile = profiles()[client]
        wanted_LE = np.where(TRAINED[client], np.sqrt(profile.grad_sq_LE / 2), -1)
        np.testing.assert_allclose(after.memory[f"grad/{client}"].numpy(), wanted_LE)
        np.testing.assert_allclose(after.memory[f"freq/{client}"].numpy() * profile.tokens_L[:, None], profile.hits_LE)
        assert update.gate_weight == WEIGHTS[client]


def test_estimates_and_profiles_are_remembered_and_old_norms_stay() -> None:
    algorithm = Flux(population())
    after, _ = play(algorithm)
    plan = replace(plan_for(0), extras=Extras(before=QuantizedProfile(), after=ForwardEstimates(((1, 3),), 1e-3, 1)))
    norm_sq = torch.zeros(2, 4, dtype=torch.float64)
    norm_sq[1, 3] = 9.0
    measured = {"freq": norm_sq / 18 + 0.25, "attention": norm_sq + 0.5, "norm_sq": norm_sq}
    update = algorithm.answer(plan, replace(result_for(0), probed=measured))
    grad_LE = update.private["grad"]
    assert grad_LE[1, 3] == 3.0
    assert torch.equal(update.private["freq"], measured["freq"])
    fewer = replace(update, private={**update.private, "grad": torch.where(norm_sq > 0, grad_LE, -1.0)})
    state = algorithm.advance(after, play_sums(algorithm), [fewer])
    wanted = torch.where(norm_sq > 0, 3.0, after.memory["grad/0"])
    assert torch.equal(state.memory["grad/0"], wanted)
    assert torch.equal(state.memory["grad/1"], after.memory["grad/1"])


def play_sums(algorithm: Flux) -> Any:
    return Accumulator(algorithm.population.spec.params).sums()


def test_inv11_a_failed_client_is_survived() -> None:
    failed = LocalFailure(Cost(), "nan")
    after, updates = play(Flux(population()), [result_for(0), failed, result_for(2)])
    assert [update.status for update in updates] == ["ok", "failed", "ok"]
    assert "freq/1" not in after.memory


def plans_by_budget(*budgets: str) -> list[ExpertPlan]:
    algorithm = Flux(population("flux.epsilon_start=0.5", budgets=budgets))
    return algorithm.plan(algorithm.init(model()), range(3))


def test_inv1_slots_fill_the_budget_and_every_expert_is_served() -> None:
    for plan, count in zip(plans_by_budget("experts=4", "experts=6", "unlimited"), (4, 6, 8), strict=True):
        assert plan.predicted.experts == plan.permitted_LE.sum() == count
        assert plan.served_LE.all()
        explored = plan.extras.after.experts if isinstance(plan.extras.after, ForwardEstimates) else ()
        assert all(plan.permitted_LE[place] and not plan.trainable_LE[place] for place in explored)
        assert 1 <= plan.trainable_LE.sum() < count
        assert all(
            not set(rows) & set(np.flatnonzero(plan.trainable_LE[int(key[4])]))
            for key, rows in plan.extras.rows.items()
        )
    assert not any(plan.extras.rows["moe.0.w_in"])  # room for all: nothing is merged


def test_one_slot_per_layer_tunes_the_best_expert_alone() -> None:
    plan = plans_by_budget("experts=2", "experts=2", "unlimited")[0]
    assert plan.permitted_LE.sum(axis=1).tolist() == [1, 1]
    assert (plan.permitted_LE == plan.trainable_LE).all()
    assert not plan.extras.rows


def test_exploitation_grows_with_the_rounds() -> None:
    algorithm = Flux(population("flux.epsilon_start=0.25", "flux.epsilon_step=0.25"))
    state = algorithm.init(model())
    trained = [algorithm.plan(replace(state, round=t), [0])[0].trainable_LE.sum() for t in range(4)]
    assert trained == [2, 4, 6, 8 * 0.9 // 1 + 1]


def test_inv10_plans_do_not_depend_on_who_else_is_planned() -> None:
    algorithm = Flux(population(budgets=("experts=4", "experts=5", "unlimited")))
    state, _ = play(algorithm)
    ahead, back = algorithm.plan(state, [0, 1, 2]), algorithm.plan(state, [2, 1, 0])[::-1]
    assert [p.permitted_LE.tobytes() for p in ahead] == [p.permitted_LE.tobytes() for p in back]
    assert [p.trainable_LE.tobytes() for p in ahead] == [p.trainable_LE.tobytes() for p in back]


def test_one_expert_per_cluster_equals_the_unmerged_model_and_merging_does_not(config: Callable[..., Config]) -> None:
    world = world_of(config("budgets=unlimited"))
    assert isinstance(world.algorithm, Flux)
    plan = world.algorithm.plan(world.algorithm.init(world.params), [0])[0]
    assert plan.permitted_LE.all()
    batch = next(iter(simulate_batches(world)))
    world.adapter.configure(world.params)
    whole = world.adapter.evaluate(batch)
    world.adapter.configure(world.params, plan.submodel(train_dense=False))
    assert world.adapter.evaluate(batch).loss_sum == pytest.approx(whole.loss_sum, rel=1e-6)
    known, all_LE = world.algorithm.profile(world.algorithm.init(world.params), 0), np.ones((2, 8), dtype=bool)
    weights = [(world.params[f"moe.{layer}.w_in"], world.params[f"moe.{layer}.w_out"]) for layer in range(2)]
    for slots, same in ((16, True), (4, False)):
        merge = plan_merge(
            expert_features(weights, seed=0),
            all_LE,
            merge_budgets(known.freq_LE, all_LE, slots),
            freq_LE=known.freq_LE,
            attention_LE=known.attention_LE,
            seed=0,
        )
        merged = replace(
            plan,
            permitted_LE=merge.stored_LE,
            trainable_LE=np.zeros_like(all_LE),
            extras=replace(
                plan.extras,
                rows=merged_experts(world.params, merge),
                alias_LE=np.where(merge.stored_LE, -1, merge.alias_LE),
            ),
        )
        world.adapter.configure(world.params, merged.submodel(train_dense=False))
        assert (world.adapter.evaluate(batch).loss_sum == pytest.approx(whole.loss_sum, rel=1e-6)) is same


def simulate_batches(world: World) -> Any:
    return client_batches(world.data.clients[0].private, seed=0, round=0, client=0, steps=2, batch_size=2, seq_len=32)


def test_the_profile_is_counted_by_loops_and_stays_in_its_declared_memory(config: Callable[..., Config]) -> None:
    world = world_of(config("budgets=unlimited"))
    plan = world.algorithm.plan(world.algorithm.init(world.params), [0])[0]
    context = ProbeContext(
        world.adapter, world.params, plan, world.config.train, lambda: simulate_batches(world), tuple
    )
    cost = profile_cost(world.population)
    assert cost is not None
    answer, peak = run_probe(QuantizedProfile(), context, torch.device("cpu"))
    assert 0.4 * cost.memory_bytes < peak <= cost.memory_bytes
    np.testing.assert_allclose(answer["freq"].sum(dim=1), world.adapter.spec.top_k)
    assert ((answer["attention"] > 0) == (answer["freq"] > 0)).all()
    assert all(layer.frozen_format is None for layer in world.adapter.moe)
    # The same in full precision is near, and is not the same.
    world.adapter.configure(world.params)
    counts_LE, tokens = np.zeros(answer["freq"].shape), 0
    with recording(world.adapter.model) as tape:
        for batch in simulate_batches(world):
            world.adapter.evaluate(batch)
            tokens += batch.tokens_SN.numel()
            counts_LE += np.stack([tape.rows_E(layer) for layer in range(len(counts_LE))])
    assert np.abs(counts_LE / tokens - answer["freq"].numpy()).sum() < 0.3 * counts_LE.sum() / tokens


def test_attention_received_is_a_mean_over_the_places_that_see_a_token(config: Callable[..., Config]) -> None:
    world = world_of(config("budgets=unlimited"))
    world.adapter.configure(world.params)
    batch = next(iter(simulate_batches(world)))
    plain = world.adapter.evaluate(batch).loss_sum
    with world.adapter.watch_attention() as received:
        assert world.adapter.evaluate(batch).loss_sum == pytest.approx(plain, rel=1e-5)
    seen = torch.arange(32, 0, -1.0)  # causal: the first token is seen by all
    for score_SN in received:
        assert score_SN is not None
        np.testing.assert_allclose((score_SN * seen).sum(dim=1), 32.0, rtol=1e-4)
    assert world.adapter.evaluate(batch).loss_sum == plain


def test_profiles_are_one_round_stale(config: Callable[..., Config]) -> None:
    """What plans round t + 1 was measured on the model that round t began with."""
    world = world_of(config("budgets=unlimited"))
    state = world.algorithm.init(world.params)
    after, _ = play_round(world, state, NullObserver())
    plan = world.algorithm.plan(state, [0])[0]
    draw = client_batches(
        world.data.clients[0].private, seed=world.config.seed, round=0, client=0, steps=2, batch_size=2, seq_len=32
    )
    batches = list(draw)
    context = ProbeContext(world.adapter, state.params, plan, world.config.train, lambda: batches, tuple)
    assert torch.equal(QuantizedProfile()(context)["attention"], after.memory["attention/0"])
    newer = replace(context, params=after.params)
    assert not torch.equal(QuantizedProfile()(newer)["attention"], after.memory["attention/0"])


def test_golden_three_rounds_hold_budgets_and_resume_to_the_same_bits(
    config: Callable[..., Config], tmp_path: Path
) -> None:
    summary = simulate.run(config(TIERS, "rounds=3", out="whole"))
    assert summary["budget_violations"] == summary["refused_updates"] == 0
    assert summary["budgeted"]
    assert summary["loss_after"] < summary["loss_before"]
    for entry in lines(tmp_path / "whole", "ledger.jsonl"):
        for kind in ("memory_bytes", "flops", "bytes_down", "bytes_up", "experts"):
            assert entry["real"][kind] <= entry["predicted"][kind], (entry["client"], kind)

    class Stop(NullObserver):
        def on_round(self, round: int, rounds: int, record: Any) -> None:
            if round == 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate.run(config(TIERS, "rounds=3", out="cut"), observer=Stop())
    assert simulate.resume(tmp_path / "cut")["model_hash"] == summary["model_hash"]


def test_eq2_weights_beat_uniform_ones_where_use_is_skewed_and_lose_where_it_misleads() -> None:
    """The claim holds where an expert's use says how often its output is wanted, and not where it does not."""
    rng = np.random.default_rng(0)
    stack = torch.from_numpy(rng.standard_normal((4, 6, 5)))
    alias_LE, x_TH = np.zeros((1, 4), dtype=np.int64), torch.from_numpy(rng.standard_normal((400, 5)))

    def error(share_LE: np.ndarray, used_E: np.ndarray) -> float:
        merged = merged_rows(stack, Merge(alias_LE, share_LE), 0)[0]
        outputs = [((x_TH @ (stack[e] - merged).T) ** 2).sum(dim=1).mean() for e in range(4)]
        return float(sum(use * out for use, out in zip(used_E, outputs, strict=True)))

    skewed_LE, flat_LE = np.array([[0.85, 0.05, 0.05, 0.05]]), np.full((1, 4), 0.25)
    weighted, uniform = (merge_shares(alias_LE, use_LE, np.ones((1, 4))) for use_LE in (skewed_LE, flat_LE))
    assert error(weighted, skewed_LE[0]) < 0.6 * error(uniform, skewed_LE[0])
    assert error(weighted, flat_LE[0]) > error(uniform, flat_LE[0])
    assert merge_budgets(np.repeat(flat_LE, 2, axis=0), np.ones((2, 4), dtype=bool), 6).tolist() == [4, 2]


def test_a_tight_budget_names_the_client() -> None:
    algorithm = Flux(replace(population(), budgets=(Budget(experts=1),) * 3))
    with pytest.raises(ValueError, match="client 0"):
        algorithm.plan(algorithm.init(model()), [0])
