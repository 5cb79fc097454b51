"""FC-MoE: each formula by hand, the mean of projected changes, what clients keep, and the same bits on any path."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hand_made import EXPERTS, KEYS, LAYERS, TRAINED, model, plan_for, population, profiles, result_for
from tiny_runs import HOUSE, TINY, fedmoe, write_notes

from fedmoe_core.algorithms.fc_moe import FcMoE, direction, frequency, opposition, regained
from fedmoe_core.budget.limits import Cost
from fedmoe_core.config.run_config import Config
from fedmoe_core.messages.result import LocalFailure, LocalResult
from fedmoe_core.server.accumulator import Accumulator
from fedmoe_core.server.agreement import refuse_hidden
from fedmoe_core.server.fixed_point import SumSettings
from fedmoe_core.server.guard.settings import Guard
from fedmoe_core.server.state import Population, ServerState
from fedmoe_core.simulation import run as simulate
from fedmoe_core.simulation.directory.checkpoint import load_checkpoint
from fedmoe_core.simulation.observer import NullObserver

# So large that no importance is cut at 1: the hand-made changes are of norm 3.
WIDE = ("train.lr=0.5", "train.local_steps=2")
EXPERT_KEYS = ("w_in", "w_out")


def facts(*overrides: str) -> Population:
    return population(*WIDE, *overrides)


def sums_of(made: Population, **options: Any) -> Accumulator:
    rule = made.config.aggregation
    settings = SumSettings(rule.scale_bits, rule.value_bound, rule.norm_bound, rule.weight_bits, max_clients=3)
    return Accumulator(made.spec.params, settings, second_visit=True, **options)


def play(algorithm: FcMoE, state: ServerState, results: Sequence[LocalResult | LocalFailure]) -> ServerState:
    """One round as the simulator plays it, of hand-made plans."""
    sums, updates = sums_of(algorithm.population), []
    for client, result in enumerate(results):
        plan = replace(plan_for(client), round=state.round)
        update = algorithm.answer(plan, result)
        outcome = sums.add(update, plan)
        assert outcome.accepted == (update.status == "ok"), outcome.reason
        updates.append(update)
    sums.close()
    return algorithm.advance(state, sums.sums(), updates)


def opposed() -> list[LocalResult]:
    """Hand-made results of which client 1 wants about the reverse of what clients 0 and 2 want of expert 1, layer 0."""
    found = [result_for(client) for client in range(3)]
    for name in EXPERT_KEYS:
        key = f"moe.0.{name}"
        wish = found[0].deltas[key][1]
        found[1].deltas[key][0] = 0.1 * found[1].deltas[key][0] - 0.6 * wish
        found[2].deltas[key][1] = 0.1 * found[2].deltas[key][1] + 0.9 * wish
    return found


def whole_changes(results: Sequence[LocalResult], layer: int, expert: int) -> dict[int, np.ndarray]:
    """The change of one expert as one vector, by the clients that trained it on some row."""
    found = {}
    for client, result in enumerate(results):
        if TRAINED[client][layer, expert] and profiles()[client].rows_LE[layer, expert] > 0:
            slot = int(TRAINED[client][layer, :expert].sum())
            parts = [result.deltas[f"moe.{layer}.{name}"][slot].numpy().ravel() for name in EXPERT_KEYS]
            found[client] = np.concatenate(parts)
    return found


def restated(results: Sequence[LocalResult], layer: int, expert: int) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """The formulas as the digest has them, literally: how the expert moves, and each client's residual."""
    changes = whole_changes(results, layer, expert)
    if not changes:
        return np.zeros(1), {}
    rows = {c: profiles()[c].rows_LE[layer] for c in changes}
    weight = {c: rows[c][expert] / rows[c].sum() * np.linalg.norm(d) for c, d in changes.items()}
    consensus = sum(weight[c] * d for c, d in changes.items()) / sum(weight.values())
    projected = {}
    for c, d in changes.items():
        cosine = d @ consensus / np.linalg.norm(d) / np.linalg.norm(consensus)
        projected[c] = d - d @ consensus / (consensus @ consensus) * consensus if cosine < 0 else d
    moved = sum(weight[c] * d for c, d in projected.items()) / sum(weight.values())
    return moved, {c: d - projected[c] for c, d in changes.items() if not np.array_equal(projected[c], d)}


def test_each_formula_by_hand() -> None:
    np.testing.assert_array_equal(frequency(np.array([[6.0, 2.0], [0.0, 0.0]])), [[0.75, 0.25], [0.0, 0.0]])
    # Changes (3, 0) of weight 2 and (-1, 1) of weight 1: N = (5, 1), g = (5, 1) / 3, <d1, g> < 0.
    dots, squares, den = np.array([[15.0, -4.0]]), np.array([[26.0, 26.0]]), np.array([[3, 3]])
    kappa = opposition(dots, squares, den)
    np.testing.assert_allclose(kappa, [[0.0, -12 / 26]])
    d1, g = np.array([-1.0, 1.0]), np.array([5.0, 1.0]) / 3
    assert abs((d1 - kappa[0, 1] * g) @ g) < 1e-15  # what is left stands at a right angle
    gain = regained([np.array([[2]]), np.array([[1]])], [kappa[:, :1], kappa[:, 1:]], den[:, :1])
    literal = (2 * np.array([3.0, 0.0]) + d1 - kappa[0, 1] * g) / 3
    np.testing.assert_allclose(gain[0, 0] * g, literal)
    assert opposition(np.array([[-1.0]]), np.array([[0.0]]), np.array([[1]]))[0, 0] == 0  # without a consensus


@pytest.mark.parametrize(
    "make", [opposed, lambda: [result_for(client) for client in range(3)]], ids=["opposed", "drawn"]
)
def test_experts_move_by_the_mean_of_projected_changes(make: Callable[[], list[LocalResult]]) -> None:
    """Against the formulas taken literally; residuals are what was taken out, and with the rest the whole change."""
    algorithm = FcMoE(facts())
    before, conflicts = algorithm.init(model()), 0
    after = play(algorithm, before, make())
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            moved, residuals = restated(make(), layer, expert)
            got = joined(after.params, layer, expert) - joined(before.params, layer, expert)
            np.testing.assert_allclose(got, np.broadcast_to(moved, got.shape), atol=2e-6)
            for client in range(3):
                kappa = float(after.memory["kappa"][client, layer, expert])
                assert (kappa < 0) == (client in residuals), (client, layer, expert)
                assert int(after.memory["born"][client, layer, expert]) == (0 if client in residuals else -1)
                if client in residuals:
                    conflicts += 1
                    consensus = {key: after.memory[direction(0, key)] for key in expert_keys()}
                    np.testing.assert_allclose(kappa * joined(consensus, layer, expert), residuals[client], atol=2e-6)
    assert (conflicts > 0) == (make is opposed)


def test_two_opposed_clients_cancel_in_a_mean_and_not_here() -> None:
    """One wants d and the other -d but for a tenth of something else; the third is silent."""
    results, algorithm = [result_for(client) for client in range(3)], FcMoE(facts())
    for name in EXPERT_KEYS:
        wish, other = results[0].deltas[f"moe.0.{name}"][1], results[1].deltas[f"moe.0.{name}"]
        other[0] = 0.1 * other[0] - wish
    changes = {client: change for client, change in whole_changes(results, 0, 1).items() if client < 2}
    before = algorithm.init(model())
    after = play(algorithm, before, [*results[:2], LocalFailure(Cost(), "out of memory")])
    moved = joined(after.params, 0, 1) - joined(before.params, 0, 1)
    length = np.linalg.norm(changes[0])
    assert np.linalg.norm(sum(changes.values()) / 2) < 0.1 * length
    assert np.linalg.norm(moved) > 0.4 * length
    assert np.linalg.norm(moved) < max(np.linalg.norm(change) for change in changes.values())
    assert sorted((after.memory["kappa"][:2, 0, 1] < 0).tolist()) == [False, True]


def joined(tensors: Mapping[str, torch.Tensor], layer: int, expert: int) -> np.ndarray:
    """One expert's tensors as one vector."""
    return torch.cat([tensors[f"moe.{layer}.{name}"][expert].flatten() for name in EXPERT_KEYS]).numpy()


def test_a_client_starts_its_next_round_with_its_residual_and_then_no_more() -> None:
    algorithm = FcMoE(facts("selection.explore=0"))
    first = play(algorithm, algorithm.init(model()), opposed())
    (plan,) = algorithm.plan(first, [1])
    kappa_LE = first.memory["kappa"][1]
    against = {(int(layer), int(expert)) for layer, expert in (kappa_LE < 0).nonzero()}
    assert (0, 1) in against
    assert {(int(key.split(".")[1]), expert) for key, rows in plan.extras.rows.items() for expert in rows} == against
    for key, rows in plan.extras.rows.items():
        for expert, row in rows.items():
            layer = int(key.split(".")[1])
            residual = float(kappa_LE[layer, expert]) * first.memory[direction(0, key)][expert]
            torch.testing.assert_close(row, first.params[key][expert] + 0.5 * residual, rtol=1e-12, atol=1e-12)
    others = [result_for(client) for client in range(3)]
    second = play(algorithm, first, others)
    born = second.memory["born"][1].numpy()
    held_LE = profiles()[1].held_LE
    assert set(born[held_LE].tolist()) <= {-1, 1}  # the old residuals of what it held are used up
    # A client that fails keeps what it had, and the consensus of that round stays for it alone.
    failed = play(algorithm, first, [others[0], LocalFailure(Cost(), "out of memory"), others[2]])
    assert torch.equal(failed.memory["born"][1], first.memory["born"][1])
    assert torch.equal(failed.memory["kappa"][1], first.memory["kappa"][1])
    assert any(key.startswith("direction/0/") for key in failed.memory)
    assert not FcMoE(facts("fc_moe.retention=0")).plan(first, [1])[0].extras.rows


def test_a_residual_waits_for_an_expert_that_is_not_held() -> None:
    algorithm = FcMoE(facts())
    first = play(algorithm, algorithm.init(model()), opposed())
    kappa, born = first.memory["kappa"].clone(), first.memory["born"].clone()
    kappa[1, 0, 0], born[1, 0, 0] = -0.25, 0  # client 1 does not hold expert 0 of layer 0
    assert not profiles()[1].held_LE[0, 0]
    second = play(algorithm, replace(first, memory={**first.memory, "kappa": kappa, "born": born}), opposed())
    assert float(second.memory["kappa"][1, 0, 0]) == -0.25
    assert int(second.memory["born"][1, 0, 0]) == 0
    rounds = {int(key.split("/")[1]) for key in second.memory if key.startswith("direction/")}
    assert rounds == {0, 1}


def test_inv10_clients_in_any_order_and_on_two_ranks_agree_with_the_sum_alike() -> None:
    made, results = facts(), opposed()
    algorithm = FcMoE(made)
    answers = [(algorithm.answer(plan_for(c), results[c]), plan_for(c)) for c in range(3)]

    def closed(order: Sequence[int]) -> dict[int, np.ndarray]:
        sums = sums_of(made)
        for client in order:
            assert sums.add(*answers[client]).accepted
        sums.close()
        return dict(sums.sums().agreement)

    want = closed([0, 1, 2])
    assert list(want) == [0, 1, 2]
    for client, dot_LE in closed([2, 0, 1]).items():
        np.testing.assert_array_equal(dot_LE, want[client])
    # Each product is of a client's own change with the sum of all: restated in float64.
    whole = {
        key: sum(w * spread_of(results, c, key) for c, w in integer_weights(answers, key)) for key in expert_keys()
    }
    for client in range(3):
        for layer in range(LAYERS):
            got = want[client][layer]
            keys = [f"moe.{layer}.{name}" for name in EXPERT_KEYS]
            dots = [(spread_of(results, client, k) * whole[k]).reshape(EXPERTS, -1).sum(axis=1) for k in keys]
            voted_E = answers[client][0].expert_weight_LE[layer] > 0
            np.testing.assert_allclose(got, np.where(voted_E, sum(dots), 0), rtol=1e-6, atol=1e-3)


def expert_keys() -> list[str]:
    return [f"moe.{layer}.{name}" for layer in range(LAYERS) for name in EXPERT_KEYS]


def spread_of(results: Sequence[LocalResult], client: int, key: str) -> np.ndarray:
    layer, name = int(key.split(".")[1]), key.split(".")[2]
    full = np.zeros(KEYS[name])
    full[TRAINED[client][layer]] = results[client].deltas[key].numpy()
    return full


def integer_weights(answers: Sequence[Any], key: str) -> list[tuple[int, np.ndarray]]:
    settings = sums_of(facts()).settings
    layer, axes = int(key.split(".")[1]), len(KEYS[key.split(".")[2]]) - 1
    weights = [settings.quantize(update.expert_weight_LE)[layer].reshape(-1, *[1] * axes) for update, _ in answers]
    return list(enumerate(weights))


def test_what_hides_or_replaces_the_changes_is_refused() -> None:
    for words, remedy in (
        (["privacy.secure=true"], "set privacy.secure=false"),
        (["guard.rule=norm"], "guard.rule=none"),
    ):
        config = Config.load(None, ["algorithm=fc_moe", "clients=6", *words])
        refuse_hidden(config, sees_conflict=False)
        with pytest.raises(ValueError, match=remedy):
            refuse_hidden(config, sees_conflict=True)
    with pytest.raises(ValueError, match="both want the updates"):
        sums_of(facts(), guard=Guard(rule="norm"))
    sums = sums_of(facts())
    with pytest.raises(ValueError, match="close"):
        sums.sums()
    with pytest.raises(ValueError, match="a second visit needs all updates in one accumulator"):
        sums.merge(sums_of(facts()))


def test_inv10_a_run_has_the_same_bits_on_two_ranks_and_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = write_notes(tmp_path / "notes.jsonl", owners="uvwx")
    words = [
        *TINY,
        "algorithm=attackers:OpposedFcMoE",
        "clients=4",
        "clients_per_round=3",
        "rounds=4",
        f"data=jsonl:{notes}",
    ]
    words += [f"cache={tmp_path / 'cache'}", "budgets=experts=50%;experts=100%", "eval.personal=true"]
    made = Config.load(None, [*words, f"out={tmp_path / 'whole'}"])
    whole = simulate.run(made)
    assert (whole["budget_violations"], whole["refused_updates"]) == (0, 0)

    class Stops(NullObserver):
        def on_round(self, round: int, rounds: int, record: Mapping[str, Any]) -> None:
            if round == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate.run(Config.load(None, [*words, f"out={tmp_path / 'cut'}"]), observer=Stops())
    resumed = simulate.resume(tmp_path / "cut", observer=NullObserver())
    (written := tmp_path / "fc.toml").write_text(made.to_toml())
    monkeypatch.setenv("PYTHONPATH", str(HOUSE / "tests" / "support" / "trust"))
    ended = fedmoe("simulate", written, "ranks=2", f"out={tmp_path / 'ranks'}", "--quiet")
    assert ended.returncode == 0, ended.stderr
    ranks = json.loads((tmp_path / "ranks" / "summary.json").read_text())
    assert whole["model_hash"] == resumed["model_hash"] == ranks["model_hash"]
    kept = load_checkpoint(tmp_path / "whole" / "checkpoint").tensors
    assert bool((kept["memory/kappa"] < 0).any())
    for name in ("cut", "ranks"):
        other = load_checkpoint(tmp_path / name / "checkpoint").tensors
        assert kept.keys() == other.keys()
        assert all(torch.equal(value, other[key]) for key, value in kept.items())
    plain = simulate.run(Config.load(None, [*words, "fc_moe.retention=0", f"out={tmp_path / 'plain'}"]))
    assert plain["model_hash"] != whole["model_hash"]
