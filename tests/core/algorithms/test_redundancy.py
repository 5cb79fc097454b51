"""The joint form of expert selection against loops, brute force and its modular limit."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe_core.algorithms.redundancy import joint_value, overlap, select_joint
from fedmoe_core.selection.knapsack import knapsack, select_top_n

SEEDS = st.integers(0, 2**32 - 1)


def draw(seed: int, layers: int, experts: int) -> tuple[np.random.Generator, np.ndarray, np.ndarray, np.ndarray]:
    """A generator, router means, values near them (some negative), and outputs of which some are near copies."""
    rng = np.random.default_rng(seed)
    prob = rng.dirichlet(np.full(experts, 0.7), size=layers)
    kinds = rng.standard_normal((layers, max(2, experts // 3), 6))
    outputs = kinds[:, rng.integers(0, kinds.shape[1], experts)] + 0.3 * rng.standard_normal((layers, experts, 6))
    return rng, prob, prob * rng.uniform(0.5, 1.5, prob.shape) - 0.01, outputs


def every_mask(layers: int, experts: int) -> np.ndarray:
    layer = [bits for bits in product([False, True], repeat=experts) if any(bits)]
    return np.array(list(product(layer, repeat=layers)))


def all_values(masks: np.ndarray, values: np.ndarray, penalty: np.ndarray) -> np.ndarray:
    held = masks.astype(float)
    return (held * values).sum(axis=(1, 2)) - np.einsum("nle,lef,nlf->n", held, penalty, held) / 2


def test_the_set_function_by_loops() -> None:
    rng, prob, values, outputs = draw(0, 3, 5)
    outputs[1, 2] = 0.0
    chosen = rng.random((3, 5)) > 0.4
    rho, expected = 3.0, 0.0
    for layer in range(3):
        inside = np.flatnonzero(chosen[layer])
        expected += sum(values[layer, e] for e in inside)
        for e, f in combinations(inside, 2):
            norms = np.linalg.norm(outputs[layer, e]) * np.linalg.norm(outputs[layer, f])
            cosine = outputs[layer, e] @ outputs[layer, f] / norms if norms else 0.0
            expected -= rho * prob[layer, e] * prob[layer, f] * max(0.0, cosine)
    assert joint_value(chosen, values, rho * overlap(prob, outputs)) == pytest.approx(expected)


@given(SEEDS)
@settings(max_examples=40, deadline=None)
def test_inv8_without_redundancy_it_is_the_exact_modular_choice(seed: int) -> None:
    rng, prob, values, outputs = draw(seed, 2, 5)
    costs = rng.integers(1, 5, (1, 2, 5))
    limit = int(costs.min(axis=2).sum() + rng.integers(0, 9))
    found = select_joint(values, 0.0 * overlap(prob, outputs), costs, [limit])
    exact = knapsack(values, costs, [limit])
    assert (found.chosen_LE == exact.chosen_LE).all()
    assert (found.value, found.gap) == (exact.value, exact.gap)
    n = int(rng.integers(2, 11))
    unit = select_joint(values, np.zeros((2, 5, 5)), np.ones((1, 2, 5), dtype=int), [n])
    assert (unit.chosen_LE == select_top_n(values, n)).all()


@pytest.mark.parametrize(("layers", "experts"), [(1, 12), (2, 8), (4, 4)])
def test_inv8_gap_to_brute_force_with_equal_costs(layers: int, experts: int) -> None:
    """Up to 16 experts: every draw exact, where the modular choice is far off."""
    masks = every_mask(layers, experts)
    gaps, modular = [], []
    for seed in range(20):
        rng, prob, values, outputs = draw(seed, layers, experts)
        penalty = rng.choice([0.5, 2, 8, 30]) * overlap(prob, outputs)
        n = int(rng.integers(layers, layers * experts // 2 + 1))
        costs = np.ones((1, layers, experts), dtype=int)
        best = all_values(masks[masks.sum(axis=(1, 2)) <= n], values, penalty).max()
        found = select_joint(values, penalty, costs, [n])
        assert found.chosen_LE.sum() <= n
        assert found.chosen_LE.any(axis=1).all()
        assert found.value == pytest.approx(joint_value(found.chosen_LE, values, penalty))
        assert found.gap >= best - found.value - 1e-12
        gaps.append((best - found.value) / abs(best))
        modular.append((best - joint_value(knapsack(values, costs, [n]).chosen_LE, values, penalty)) / abs(best))
    assert max(gaps) < 1e-9
    assert np.mean(modular) > 0.02


@given(SEEDS)
@settings(max_examples=30, deadline=None)
def test_unequal_costs_hold_their_limits_and_stay_near_the_optimum(seed: int) -> None:
    rng, prob, values, outputs = draw(seed, 2, 5)
    penalty = rng.choice([1.0, 10.0]) * overlap(prob, outputs)
    costs = rng.integers(1, 9, (2, 2, 5))
    limits = costs[:, np.arange(2), rng.integers(0, 5, 2)].sum(axis=1) + rng.integers(0, 12, 2)
    masks = every_mask(2, 5)
    fits = ((costs[:, None] * masks).sum(axis=(2, 3)) <= limits[:, None]).all(axis=0)
    if not fits.any():
        with pytest.raises(ValueError, match="one expert per MoE layer"):
            select_joint(values, penalty, costs, limits)
        return
    found = select_joint(values, penalty, costs, limits)
    assert ((costs * found.chosen_LE).sum(axis=(1, 2)) <= limits).all()
    assert found.chosen_LE.any(axis=1).all()
    best = all_values(masks[fits], values, penalty).max()
    assert best - found.value <= found.gap + 1e-9
    assert found.value >= joint_value(knapsack(values, costs, limits).chosen_LE, values, penalty) - 1e-12


def test_of_two_twins_one_is_enough() -> None:
    values = np.array([[0.5, 0.49, 0.1]])
    outputs = np.array([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    penalty = 2.0 * overlap(np.array([[0.5, 0.49, 0.01]]), outputs)
    unit = np.ones((1, 1, 3), dtype=int)
    assert select_joint(values, np.zeros((1, 3, 3)), unit, [2]).chosen_LE.tolist() == [[True, True, False]]
    assert select_joint(values, penalty, unit, [2]).chosen_LE.tolist() == [[True, False, True]]
    # Opposite outputs are no redundancy: they do not overlap.
    assert overlap(np.full((1, 2), 0.5), np.array([[[1.0], [-1.0]]])).tolist() == [[[0, 0], [0, 0]]]


def test_a_negative_penalty_is_named() -> None:
    penalty = np.zeros((1, 2, 2))
    penalty[0, 0, 1] = -1.0
    with pytest.raises(ValueError, match=r"experts 0 and 1 in layer 0 is -1\.0"):
        select_joint(np.ones((1, 2)), penalty, np.ones((1, 1, 2), dtype=int), [1])
