"""FLEX-MoE: its phases as wired, local gates, balance far beyond greedy assignment's, and whole runs under budgets."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from assignment_restated import greedy
from hand_made import EXPERTS, HIDDEN, LAYERS, SAMPLES, TRAINED, WEIGHTS, model, plan_for, profiles, result_for, spread
from hand_made import population as hand_made_population
from tiny_corpus import make_config

from fedmoe_core.algorithms.flex_moe.flex_moe import Feedback, FlexMoE, LocalFeedback
from fedmoe_core.budget.limits import Cost
from fedmoe_core.client.step import log_prior
from fedmoe_core.comparison.run_figures import figures_of
from fedmoe_core.config.run_config import Config
from fedmoe_core.messages.plan import ExpertPlan, Extras
from fedmoe_core.messages.result import LocalFailure, LocalResult
from fedmoe_core.messages.update import ClientUpdate
from fedmoe_core.reporting.run import read_runs
from fedmoe_core.server.accumulator import Accumulator
from fedmoe_core.server.fixed_point import SumSettings
from fedmoe_core.server.state import Population, ServerState, recall, remember
from fedmoe_core.simulation import run as simulate
from fedmoe_core.simulation.cohorts.drawing import round_batches
from fedmoe_core.simulation.cohorts.training import train_alone
from fedmoe_core.simulation.directory.checkpoint import load_checkpoint
from fedmoe_core.simulation.directory.log import coefficient_of_variation
from fedmoe_core.simulation.observer import NullObserver
from fedmoe_core.simulation.prepare import build_world
from fedmoe_core.simulation.process_group import Ranks

TIERS = ("experts=2", "experts=4", "unlimited")
TOKENS = 8 * 64  # local steps x tokens of hand_made


def algorithm_of(*overrides: str, budgets: tuple[str, ...] = TIERS) -> FlexMoE:
    facts: Population = hand_made_population(*overrides, budgets=budgets)
    return FlexMoE(replace(facts, samples_C=np.resize(SAMPLES, len(budgets))))


def plan_with_gate(algorithm: FlexMoE, client: int) -> ExpertPlan:
    """The hand-made plan of a client, with a gate of its own on it."""
    rows = {f"moe.{layer}.router": dict(enumerate(own_gate(client, layer))) for layer in range(LAYERS)}
    return replace(plan_for(client), extras=Extras(rows=rows, keeps=frozenset({"router"}), after=LocalFeedback(1)))


def own_gate(client: int, layer: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10 * client + layer)
    return torch.randn(EXPERTS, HIDDEN, generator=generator, dtype=torch.float64)


SEEN = np.random.default_rng(4).uniform(1, 9, (3, 3, LAYERS, EXPERTS))  # client; rows, rows x loss, rows x right
SEEN[:, 2] *= SEEN[:, 0] / 9  # not more are right than there are


def result_with_gate(client: int) -> LocalResult:
    result = result_for(client)
    kept = {key: own_gate(9, 0)[: len(d)] for key, d in result.deltas.items() if key.endswith("router")}
    deltas = {key: delta for key, delta in result.deltas.items() if not key.endswith("router")}
    seen = torch.from_numpy(SEEN[client] * profiles()[client].held_LE)
    probed = dict(zip(LocalFeedback.measures, seen, strict=True))
    return replace(result, deltas=deltas, kept=kept, probed=probed)


def played(algorithm: FlexMoE, *, reverse: bool = False) -> tuple[ServerState, list[ClientUpdate]]:
    rule, updates = algorithm.population.config.aggregation, []
    settings = SumSettings(rule.scale_bits, rule.value_bound, rule.norm_bound, rule.weight_bits, max_clients=3)
    sums = Accumulator(algorithm.population.spec.params, settings)
    for client in range(3):
        plan = plan_with_gate(algorithm, client)
        updates.append(algorithm.answer(plan, result_with_gate(client)))
        assert (outcome := sums.add(updates[-1], plan)).accepted, outcome.reason
    ordered = updates[::-1] if reverse else updates
    return algorithm.advance(algorithm.init(model()), sums.sums(), ordered), updates


def test_experts_are_weighted_by_usage_and_routers_keep_their_bits() -> None:
    after, updates = played(algorithm_of())
    for layer in range(LAYERS):
        assert torch.equal(after.params[f"moe.{layer}.router"], model()[f"moe.{layer}.router"])
        for name in ("w_in", "w_out"):
            key = f"moe.{layer}.{name}"
            wanted = model()[key].numpy().copy()
            for expert in range(EXPERTS):
                users = [c for c in range(3) if TRAINED[c][layer, expert]]
                u = [profiles()[c].rows_LE[layer, expert] for c in users]
                if sum(u) > 0:
                    wanted[expert] += sum(w * spread(c, key)[expert] for w, c in zip(u, users, strict=True)) / sum(u)
            np.testing.assert_allclose(after.params[key].numpy(), wanted, rtol=0, atol=1e-6, err_msg=key)
    for client, update in enumerate(updates):
        np.testing.assert_allclose(
            update.expert_weight_LE, profiles()[client].rows_LE / TOKENS * TRAINED[client], rtol=1e-12
        )
        assert not update.router_weight_LE.any()
        assert update.gate_weight == 0


def test_the_trained_rows_of_the_gate_stay_with_the_client() -> None:
    algorithm = algorithm_of()
    after, _ = played(algorithm)
    for client in range(3):
        for layer in range(LAYERS):
            trained_E, wanted = TRAINED[client][layer], own_gate(client, layer)
            wanted[torch.from_numpy(trained_E)] = own_gate(9, 0)[: trained_E.sum()]
            assert torch.equal(after.memory[f"gate/{client}"][layer], wanted)
            for plan in (algorithm.plan(after, [client])[0], algorithm.personal(after, client)):
                assert plan.extras.keeps == {"router"}
                served = torch.stack([plan.extras.rows[f"moe.{layer}.router"][e] for e in range(EXPERTS)])
                assert torch.equal(served, wanted)


def test_fitness_is_the_moving_average_of_accuracy_exp_loss_and_usage_share() -> None:
    algorithm = algorithm_of("flex_moe.rate=0.3")
    once, updates = played(algorithm)
    twice = algorithm.advance(once, Accumulator(algorithm.population.spec.params).sums(), updates)
    for state, visits in ((once, 1), (twice, 2)):
        known = recall(Feedback, state.memory)
        for client, profile in enumerate(profiles()):
            for layer, expert in np.ndindex(LAYERS, EXPERTS):
                q = 0.0
                if profile.held_LE[layer, expert]:
                    rows, loss, right = SEEN[client][:, layer, expert]
                    share = profile.rows_LE[layer, expert] / profile.rows_LE[layer].sum()
                    q = right / rows + np.exp(-loss / rows) + share
                # The same q again moves nothing.
                assert known.mean_LCE[layer, client, expert] == pytest.approx(q)
                assert known.tried_LCE[layer, client, expert] == visits * profile.held_LE[layer, expert]


def test_deficits_add_up_what_an_expert_was_short_of() -> None:
    algorithm = algorithm_of()
    state, updates = played(algorithm)
    load_LE = sum(WEIGHTS[c] * profiles()[c].held_LE for c in range(3))
    mean_L1 = load_LE.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(recall(Feedback, state.memory).deficit_LE, np.maximum(mean_L1 - load_LE, 0))
    state = algorithm.advance(state, Accumulator(algorithm.population.spec.params).sums(), updates[:1])
    again_LE = WEIGHTS[0] * profiles()[0].held_LE
    wanted = np.maximum(np.maximum(mean_L1 - load_LE, 0) + again_LE.mean(axis=1, keepdims=True) - again_LE, 0)
    np.testing.assert_allclose(recall(Feedback, state.memory).deficit_LE, wanted)


def test_permuting_the_reports_or_the_clients_changes_nothing() -> None:
    algorithm = algorithm_of()
    one, other = played(algorithm)[0], played(algorithm, reverse=True)[0]
    assert all(torch.equal(one.memory[key], other.memory[key]) for key in one.memory)
    for clients in ([0, 1, 2], [0, 2]):
        ahead, back = algorithm.plan(one, clients), algorithm.plan(one, clients[::-1])[::-1]
        assert [p.permitted_LE.tobytes() for p in ahead] == [p.permitted_LE.tobytes() for p in back]


# Assignment.


def skewed(algorithm: FlexMoE) -> tuple[ServerState, np.ndarray]:
    """A state in which every client does best by the same experts, and that fitness (L, C, E)."""
    state = algorithm.init(model())
    known = recall(Feedback, state.memory)
    rng = np.random.default_rng(2)
    mean_LCE = np.linspace(3, 0, EXPERTS) + rng.normal(0, 0.2, known.mean_LCE.shape)
    known = replace(known, mean_LCE=mean_LCE, tried_LCE=np.full_like(known.tried_LCE, 5))
    return algorithm._with_next(replace(state, round=5), known), mean_LCE


def cv_of(held_CLE: np.ndarray, samples_C: np.ndarray) -> float:
    return float(np.mean([coefficient_of_variation(samples_C @ held_CLE[:, layer]) for layer in range(LAYERS)]))


def test_the_load_varies_far_less_than_under_greedy_assignment() -> None:
    budgets = ("experts=2",) * 8 + ("experts=4",) * 4
    algorithm = algorithm_of("aggregation.weighting=uniform", budgets=budgets)
    state, mean_LCE = skewed(algorithm)
    held_CLE = np.stack([plan.permitted_LE for plan in algorithm.plan(state, range(12))])
    counts_LC = held_CLE.sum(axis=2).T
    assert counts_LC.tolist() == [[1] * 8 + [2] * 4] * 2
    unit_C = np.ones(12)
    greedy_CLE = np.stack([greedy(mean_LCE[la], counts_LC[la]) for la in range(LAYERS)], axis=1)
    assert cv_of(greedy_CLE, unit_C) > 0.9
    assert cv_of(held_CLE, unit_C) == 0.0
    assert held_CLE[:, 0].sum(axis=0).tolist() == [4] * 4


def test_unequal_clients_are_balanced_by_what_data_they_bring() -> None:
    algorithm = algorithm_of(budgets=("experts=2",) * 9 + ("experts=4",) * 6)
    state, mean_LCE = skewed(algorithm)
    held_CLE = np.stack([plan.permitted_LE for plan in algorithm.plan(state, range(15))])
    greedy_CLE = np.stack([greedy(mean_LCE[la], held_CLE[:, la].sum(axis=1)) for la in range(LAYERS)], axis=1)
    samples_C = algorithm.population.samples_C
    assert cv_of(held_CLE, samples_C) < 0.1 < 0.9 < cv_of(greedy_CLE, samples_C)


def test_a_round_of_some_shares_out_among_those_and_counts_follow_the_budget() -> None:
    algorithm = algorithm_of("aggregation.weighting=uniform", budgets=("experts=2",) * 8)
    state, _ = skewed(algorithm)
    held_CLE = np.stack([plan.permitted_LE for plan in algorithm.plan(state, [0, 3, 5, 6])])
    assert held_CLE.sum(axis=0).tolist() == [[1] * EXPERTS] * LAYERS  # each expert once among the four
    bare = algorithm_of().plan(algorithm_of().init(model()), [0])[0].predicted
    for budget, held in (("experts=3", 3), ("experts=5", 5), ("unlimited", 8), (f"memory={bare.memory_bytes}", 2)):
        few = algorithm_of(budgets=(budget,) * 3)
        assert [plan.permitted_LE.sum() for plan in few.plan(few.init(model()), range(3))] == [held] * 3


def test_the_first_assignment_is_a_draw_of_the_seed() -> None:
    draws = {
        seed: recall(Feedback, algorithm_of(f"seed={seed}", budgets=("experts=4",) * 8).init(model()).memory).next_CLE
        for seed in (0, 1)
    }
    assert not np.array_equal(draws[0], draws[1])
    assert len({held_LE.tobytes() for held_LE in draws[0]}) > 3
    again = algorithm_of("seed=0", budgets=("experts=4",) * 8).init(model())
    np.testing.assert_array_equal(draws[0], recall(Feedback, again.memory).next_CLE)


def test_the_first_gate_is_sent_once_and_feedback_is_paid_by_who_can() -> None:
    algorithm = algorithm_of()
    state = algorithm.init(model())
    gates = LAYERS * EXPERTS * HIDDEN * 8
    first = algorithm.plan(state, [0])[0]
    later = algorithm.plan(replace(state, visits=(1, 1, 1)), [0])[0]
    assert (first.extras.surcharge.bytes_down, later.extras.surcharge.bytes_down) == (gates, 0)
    assert first.extras.surcharge.flops == algorithm.population.costs.forward_flops(first.permitted_LE, tokens=2 * 64)
    step = algorithm.population.costs.step_flops(first.permitted_LE, first.permitted_LE)
    poor = algorithm_of(budgets=(f"flops={2 * step}",) * 3)
    plan = poor.plan(poor.init(model()), [0])[0]
    assert (plan.extras.after, plan.extras.surcharge.flops, plan.extras.surcharge.bytes_up) == (None, 0.0, 0)
    assert algorithm_of("flex_moe.feedback=0").plan(state, [0])[0].extras.after is None


def test_inv11_a_failed_client_keeps_its_gate_and_teaches_nothing() -> None:
    algorithm = algorithm_of()
    state, _ = played(algorithm)
    lost = algorithm.answer(plan_with_gate(algorithm, 1), LocalFailure(Cost(), "oom"))
    after = algorithm.advance(state, Accumulator(algorithm.population.spec.params).sums(), [lost])
    assert torch.equal(after.memory["gate/1"], state.memory["gate/1"])
    one, two = recall(Feedback, state.memory), recall(Feedback, after.memory)
    assert remember(replace(two, next_CLE=one.next_CLE)).keys() == remember(one).keys()
    for name in ("mean_LCE", "tried_LCE", "deficit_LE"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))


# Whole runs.

Make = Callable[..., Config]


@pytest.fixture
def config(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    make = make_config(tmp_path, tmp_path_factory.getbasetemp() / "tiny")
    return lambda *words, **rest: make("algorithm=flex_moe", "rounds=3", *words, **rest)


def lines(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def memory_of(run: Path) -> dict[str, torch.Tensor]:
    tensors = load_checkpoint(run / "checkpoint").tensors
    return {key.removeprefix("memory/"): t for key, t in tensors.items() if key.startswith("memory/")}


def test_three_rounds_on_text(config: Make, tmp_path: Path) -> None:
    """Golden: experts by budget in balance, no global model, gates of their own, and personal loss that falls."""
    summary = simulate.run(config())
    assert (summary["budget_violations"], summary["refused_updates"], summary["budgeted"]) == (0, 0, True)
    assert summary["loss_after"] is None
    rounds = [line for line in lines(tmp_path / "run") if line["type"] == "round"]
    own = [np.mean(line["personal_loss_C"]) for line in rounds]
    assert all(later < earlier for earlier, later in pairwise(own))
    held = [np.sum(line["held_LE"], axis=1) for line in lines(tmp_path / "run") if line["type"] == "client"]
    assert np.array(held).tolist() == [[1, 1], [2, 2], [4, 4], [8, 8]] * 3
    # Loads of about 1, 2, 4 and 8 halves cannot be level; the closest are.
    assert all(line["load_cv"] < 0.25 for line in rounds[1:])
    memory = memory_of(tmp_path / "run")
    assert not torch.equal(memory["gate/3"], memory["gate/2"])
    assert memory["gate/0"].shape == (2, 8, 32)
    for entry in lines(tmp_path / "run", "ledger.jsonl"):
        for kind in ("memory_bytes", "flops", "bytes_down", "bytes_up", "experts"):
            assert entry["real"][kind] <= entry["predicted"][kind], kind


@pytest.mark.parametrize("labeled", [True, False])
def test_a_clients_feedback_is_that_of_its_trained_model_by_expert(config: Make, labeled: bool) -> None:
    made = config("flex_moe.feedback=1", "train.batch_size=1", labeled=labeled)
    world = build_world(made.resolved(), Ranks(), NullObserver())
    state = world.algorithm.init(world.params)
    for plan in world.algorithm.plan(state, [0, 2]):
        update = train_alone(world, state, plan).update
        rows_LE, loss_LE, right_LE = update.private["feedback"].numpy()
        batch = next(iter(round_batches(world, plan)))
        prior_C = log_prior(world.data.class_shares(plan.client), world.config.train, torch.device("cpu"))
        assert (prior_C is not None) is labeled
        found = world.adapter.evaluate(batch, log_prior_C=prior_C)  # the live model is still the one that trained
        count = int(batch.mask_SN.sum()) - (not labeled)  # the first token is predicted by nobody
        choices_L = np.minimum(plan.top_k, plan.permitted_LE.sum(axis=1))
        np.testing.assert_array_equal(rows_LE.sum(axis=1), choices_L * count)
        assert not rows_LE[~plan.permitted_LE].any()
        np.testing.assert_allclose(loss_LE.sum(axis=1), choices_L * count * found.loss_sum / found.count, rtol=1e-4)
        if labeled:
            np.testing.assert_array_equal(right_LE, rows_LE * found.correct)


def test_inv1_every_kind_of_budget_holds(config: Make) -> None:
    limits = ("memory=550KiB", "down=150kB", "up=80kB", "flops=4e7")
    summary = simulate.run(config("budgets=" + json.dumps(limits)))
    assert (summary["budget_violations"], summary["refused_updates"]) == (0, 0)


def test_inv10_a_resumed_run_has_the_same_bits(config: Make, tmp_path: Path) -> None:
    whole = simulate.run(config("clients_per_round=3", out_name="whole"))

    class Stop(NullObserver):
        def on_round(self, round: int, rounds: int, record: Any) -> None:
            if round == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate.run(config("clients_per_round=3", out_name="cut"), observer=Stop())
    assert simulate.resume(tmp_path / "cut")["model_hash"] == whole["model_hash"]
    one, two = memory_of(tmp_path / "whole"), memory_of(tmp_path / "cut")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_the_feature_extractor_is_averaged_where_it_trains(config: Make, tmp_path: Path) -> None:
    summary = simulate.run(config("rounds=2", labeled=True))
    assert summary["refused_updates"] == 0
    found = figures_of(read_runs([tmp_path / "run"])[0], "flex_moe")
    assert (found.accuracy, found.whole) == (True, None)  # so the study ranks it by its clients
    assert found.clients == pytest.approx(np.mean(summary["personal_accuracy_C"]))
    world = build_world(config("rounds=2", labeled=True).resolved(), Ranks(), NullObserver())
    tensors = load_checkpoint(tmp_path / "run" / "checkpoint").tensors
    dense = [key for key in world.params if key.startswith("dense.")]
    assert not any(torch.equal(tensors[f"params/{key}"], world.params[key]) for key in dense)
    assert (memory_of(tmp_path / "run")["mean_LCE"] > 0).any()
