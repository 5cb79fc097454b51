"""FLEX-MoE's fitness, deficits and program: plain re-statements, brute force, integrality and balance."""

from __future__ import annotations

from itertools import combinations, product
from math import ceil, exp, floor, log, sqrt
from unittest.mock import patch

import numpy as np
import pytest
from assignment_restated import greedy, random_experts
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize

from fedmoe_core.algorithms.flex_moe import assignment
from fedmoe_core.algorithms.flex_moe.assignment import (
    Fitness,
    Program,
    assign,
    assign_layers,
    load_bounds,
    next_deficit,
    observe,
    quality,
    scores,
)
from fedmoe_core.simulation.directory.log import coefficient_of_variation

SEEDS = st.integers(0, 2**32 - 1)


def every_choice(counts: np.ndarray, experts: int) -> list[np.ndarray]:
    """All masks in which client c holds exactly counts[c] experts."""
    rows = [[np.isin(np.arange(experts), some) for some in combinations(range(experts), k)] for k in counts]
    return [np.array(mask) for mask in product(*rows)]


def restated(x: np.ndarray, value: np.ndarray, samples: np.ndarray, low: float, high: float, price: float) -> float:
    """The objective with a given slack price, by loops; nobody empty is checked apart."""
    total = sum(value[c, e] for c, e in np.argwhere(x))
    for e in range(x.shape[1]):
        load = sum(samples[c] for c in range(len(x)) if x[c, e])
        total -= price * (max(0.0, low - load) + max(0.0, load - high)) / samples.mean()
    return float(total)


@given(SEEDS, st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_program_equals_brute_force(seed: int, weighted: bool) -> None:
    rng = np.random.default_rng(seed)
    clients, experts = int(rng.integers(1, 5)), int(rng.integers(2, 5))
    counts = rng.integers(1, experts + 1, clients)
    samples = rng.integers(1, 9, clients) if weighted else np.full(clients, int(rng.integers(1, 9)))
    q, d = rng.standard_normal((clients, experts)), rng.random(experts) * samples.mean()
    delta, eta, price = rng.choice([0.0, 0.2, 0.5]), rng.random(), rng.choice([0.1, 1.0, 50.0])
    found = assign(q, counts, samples, deficit_E=d, program=Program(eta, delta, price))
    mean_load = sum(n * k for n, k in zip(samples, counts, strict=True)) / experts
    value = q + eta * d / mean_load
    low, high = load_bounds(samples, counts, experts, delta)
    masks = every_choice(counts, experts)
    fewest = min(int((~mask.any(axis=0)).sum()) for mask in masks)
    covering = [mask for mask in masks if (~mask.any(axis=0)).sum() == fewest]
    best = max(restated(mask, value, samples, low, high, price) for mask in covering)
    assert restated(found.chosen_CE, value, samples, low, high, price) == pytest.approx(best, abs=1e-6)
    assert (found.chosen_CE.sum(axis=1) == counts).all()
    assert (~found.chosen_CE.any(axis=0)).sum() == fewest
    assert found.gap <= 1e-5 * max(1.0, abs(found.value))
    assert found.load_E.tolist() == (samples @ found.chosen_CE).tolist()


@given(SEEDS)
@settings(max_examples=30, deadline=None)
def test_by_default_bounds_come_before_scores(seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts, samples = rng.integers(1, 4, 4), np.ones(4, dtype=int)
    q = 5 * rng.standard_normal((4, 3))
    found = assign(q, counts, samples, program=Program(delta=0.0))
    low, high = load_bounds(samples, counts, 3, 0.0)

    def slack(x: np.ndarray) -> float:
        load = samples @ x
        return float(np.maximum(low - load, 0).sum() + np.maximum(load - high, 0).sum())

    masks = [mask for mask in every_choice(counts, 3) if mask.any(axis=0).all()]
    least = min(slack(mask) for mask in masks)
    assert slack(found.chosen_CE) == least
    assert q[found.chosen_CE].sum() == pytest.approx(max(q[m].sum() for m in masks if slack(m) == least), abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_with_unit_loads_the_linear_program_is_integral(seed: int) -> None:
    """The same program without integrality: its vertex has whole x, and the same value."""
    rng = np.random.default_rng(seed)
    q, counts, samples = rng.standard_normal((12, 8)), rng.integers(1, 6, 12), np.full(12, 30)
    exact = assign(q, counts, samples)
    answers = []

    def relaxed(*args: np.ndarray, integrality: np.ndarray, **rest: object) -> optimize.OptimizeResult:
        answers.append(optimize.milp(*args, integrality=0 * integrality, **rest))
        answers[-1].mip_dual_bound = answers[-1].fun
        return answers[-1]

    with patch.object(assignment, "milp", relaxed):
        linear = assign(q, counts, samples)
    x = answers[0].x[:96]
    assert np.abs(x - x.round()).max() < 1e-9
    assert linear.value == pytest.approx(exact.value, abs=1e-6)
    assert exact.gap < 1e-5


def test_loads_are_far_more_even_than_greedys() -> None:
    """The paper's claim: CV above .29 for greedy assignment, about .003 with the program; 20 clients, 8 experts."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((20, 8)) + 1.5 * rng.standard_normal(8)  # some experts please everybody
    counts = np.full(20, 2)
    unit = assign(q, counts, np.ones(20), program=Program(delta=0.0))
    greedy_cv = coefficient_of_variation(np.ones(20) @ greedy(q, counts))
    assert greedy_cv > 0.29
    assert coefficient_of_variation(unit.load_E) == 0.0
    samples = rng.integers(50, 1000, 20)
    weighted = assign(q, counts, samples, program=Program(delta=0.01))
    assert coefficient_of_variation(weighted.load_E) < 0.05 * coefficient_of_variation(samples @ greedy(q, counts))
    random_CE = random_experts(counts, 8, rng)
    assert q[unit.chosen_CE].sum() > q[random_CE].sum()
    assert (random_CE.sum(axis=1) == counts).all()


def test_a_deficit_is_paid_back() -> None:
    """Three places for four experts: the one left out comes in next round, although it is everybody's worst."""
    q = np.tile([0.3, 0.2, 0.1, -9.0], (3, 1))
    counts, samples = np.ones(3, dtype=int), np.ones(3)
    first = assign(q, counts, samples)
    assert first.chosen_CE.any(axis=0).tolist() == [True, True, True, False]
    owed = next_deficit(np.zeros(4), first.load_E)
    assert owed.tolist() == [0, 0, 0, 0.75]
    assert assign(q, counts, samples, deficit_E=owed, program=Program(deficit_weight=10.0)).chosen_CE[:, 3].any()
    assert next_deficit(np.array([0.0, 2.0]), np.array([1.0, 5.0])).tolist() == [2.0, 0.0]


def test_quality_average_and_scores_by_loops() -> None:
    rng = np.random.default_rng(1)
    accuracy, loss, usage = rng.random((3, 4)), rng.random((3, 4)), rng.integers(0, 9, (3, 4)) + 1.0
    accuracy[0, 0] = loss[0, 0] = np.nan  # the expert saw no token
    found = quality(accuracy, loss, usage)
    for c, e in product(range(3), range(4)):
        measured = 0.0 if (c, e) == (0, 0) else accuracy[c, e] + exp(-loss[c, e])
        assert found[c, e] == pytest.approx(measured + usage[c, e] / usage[c].sum())
    before = Fitness(rng.random((3, 4)), rng.integers(0, 3, (3, 4)))
    assigned = rng.random((3, 4)) > 0.5
    after = observe(before, found, assigned, rate=0.3)
    bonus, raw = np.zeros((3, 4)), np.zeros((3, 4))
    for c, e in product(range(3), range(4)):
        if not assigned[c, e]:
            expected = before.mean_CE[c, e]
        elif before.tried_CE[c, e] == 0:
            expected = found[c, e]
        else:
            expected = 0.7 * before.mean_CE[c, e] + 0.3 * found[c, e]
        assert after.mean_CE[c, e] == pytest.approx(expected)
        assert after.tried_CE[c, e] == before.tried_CE[c, e] + assigned[c, e]
        bonus[c, e] = 0.4 * sqrt(log(5) / (1 + after.tried_CE[c, e]))
    z = scores(after, 4, exploration=0.4)
    assert (after.tried_CE == 0).any()
    for c in range(3):
        known = [after.mean_CE[c, e] for e in range(4) if after.tried_CE[c, e]]
        raw[c] = [after.mean_CE[c, e] if after.tried_CE[c, e] else np.mean(known) for e in range(4)]
        raw[c] += bonus[c]
        assert np.allclose(z[c], (raw[c] - raw[c].mean()) / raw[c].std())
    flat = scores(Fitness(np.full((2, 3), 0.1), np.zeros((2, 3))), 0, exploration=1.0)
    assert flat.tolist() == np.zeros((2, 3)).tolist()


def test_bounds_of_unit_loads_are_whole_clients() -> None:
    assert load_bounds(np.full(20, 7), np.full(20, 2), 8, 0.25) == (ceil(3.75) * 7, floor(6.25) * 7)
    assert load_bounds(np.ones(5), np.ones(5, dtype=int), 2, 0.0) == (2, 3)  # no whole number at 2.5
    assert load_bounds(np.array([1, 3]), np.ones(2, dtype=int), 2, 0.5) == (1.0, 3.0)


def test_layers_are_assigned_alone_and_bad_input_is_named() -> None:
    rng = np.random.default_rng(2)
    q, counts, samples = rng.standard_normal((3, 6, 4)), rng.integers(1, 4, (3, 6)), rng.integers(1, 5, 6)
    deficit = rng.random((3, 4))
    for layer, found in enumerate(assign_layers(q, counts, samples, deficit_LE=deficit)):
        alone = assign(q[layer], counts[layer], samples, deficit_E=deficit[layer])
        assert (found.chosen_CE == alone.chosen_CE).all()
    assert coefficient_of_variation(np.zeros(3)) == 0.0
    with pytest.raises(ValueError, match=r"client 1: 5 experts of a layer is outside 1\.\.4"):
        assign(q[0, :2], np.array([1, 5]), samples[:2])
    q[0, 1, 2] = np.inf
    with pytest.raises(ValueError, match=r"client 1, expert 2 is not finite"):
        assign(q[0], counts[0], samples)
