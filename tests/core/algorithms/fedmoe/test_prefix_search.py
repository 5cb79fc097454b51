"""FedMoE's search for theta (eq. 3) against brute force over all masks and over all breakpoints."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe_core.algorithms.fedmoe.prefix_search import activation_shares, prefix_search, prefixes

SEEDS = st.integers(0, 2**32 - 1)
NOTHING = np.zeros(1, dtype=np.int64)  # spent before any expert
SIZES = st.tuples(st.integers(1, 3), st.integers(1, 4))


def masks(layers: int, experts: int) -> np.ndarray:
    layer = [bits for bits in product([False, True], repeat=experts) if any(bits)]
    return np.array(list(product(layer, repeat=layers)))


def covered(p_LE: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Smallest share that any layer covers, written with loops over layers."""
    shares = [row / row.sum() for row in p_LE]
    return np.min([(chosen[..., layer, :] * share).sum(axis=-1) for layer, share in enumerate(shares)], axis=0)


@given(SEEDS, SIZES)
@settings(deadline=None)
def test_equal_sizes_are_solved_exactly(seed: int, sizes: tuple[int, int]) -> None:
    rng = np.random.default_rng(seed)
    p_LE = rng.dirichlet(np.full(sizes[1], 0.5), size=sizes[0]) + 1e-6
    count = int(rng.integers(sizes[0], p_LE.size + 1))
    found = prefix_search(p_LE, np.ones((1, *sizes), dtype=np.int64), np.array([count]), base_D=NOTHING, fill=1.0)
    every = masks(*sizes)
    best = covered(p_LE, every[every.sum(axis=(1, 2)) <= count]).max()
    assert covered(p_LE, found) == pytest.approx(best, abs=1e-8)
    assert found.sum() <= count
    assert found.any(axis=1).all()


@given(SEEDS, SIZES)
@settings(deadline=None)
def test_unequal_sizes_give_the_best_of_all_prefixes(seed: int, sizes: tuple[int, int]) -> None:
    rng = np.random.default_rng(seed)
    p_LE = rng.dirichlet(np.ones(sizes[1]), size=sizes[0]) + 1e-3
    costs = rng.integers(1, 9, (2, *sizes))
    base = np.array([3, 5])
    least = (costs * prefixes(p_LE, 0.0)).sum(axis=(1, 2)) + base
    limits = least + rng.integers(0, 12, 2)
    found = prefix_search(p_LE, costs, limits, base_D=base, fill=1.0)
    breakpoints = np.cumsum(np.sort(activation_shares(p_LE), axis=1)[:, ::-1], axis=1).ravel()
    ladders = [prefixes(p_LE, theta) for theta in (0.0, *breakpoints)]
    fitting = [x for x in ladders if ((costs * x).sum(axis=(1, 2)) + base <= limits).all()]
    assert covered(p_LE, found) == pytest.approx(max(float(covered(p_LE, x)) for x in fitting), abs=1e-8)
    every = masks(*sizes)
    fits = ((costs[:, None] * every).sum(axis=(2, 3)) + base[:, None] <= limits[:, None]).all(axis=0)
    assert covered(p_LE, found) <= covered(p_LE, every[fits]).max() + 1e-9


def test_the_whole_model_fits_at_theta_one() -> None:
    p_LE = np.array([[3.0, 0.0, 1.0], [0.1, 0.2, 0.7]])
    found = prefix_search(p_LE, np.full((1, 2, 3), 4), np.array([24]), base_D=NOTHING, fill=1.0)
    assert covered(p_LE, found) == 1.0
    # The expert that was never used adds nothing, so the shortest prefix leaves it out.
    assert found.tolist() == [[True, False, True], [True, True, True]]


def test_by_hand_with_ties_and_dense_memory_and_reserve() -> None:
    p_LE = np.array([[4.0, 4.0, 1.0, 1.0], [7.0, 1.0, 1.0, 1.0]])
    # floor(.8 * 100) - 20 = 60 is room for three experts of 20: the tie goes to expert 0, then .7 beats nothing.
    found = prefix_search(p_LE, np.full((1, 2, 4), 20), np.array([100]), base_D=np.array([20]), fill=0.8)
    assert found.tolist() == [[True, True, False, False], [True, False, False, False]]
    assert covered(p_LE, found) == pytest.approx(0.7)


def test_a_silent_layer_keeps_one_expert_and_top_k_counts_are_shares() -> None:
    assert activation_shares(np.zeros((1, 4))).tolist() == [[0.25] * 4]
    p_LE = np.array([[0.0, 0.0, 0.0], [1.0, 1.0, 0.0]])  # the second layer sums to k = 2
    found = prefix_search(p_LE, np.ones((1, 2, 3), dtype=np.int64), np.array([2]), base_D=NOTHING, fill=1.0)
    assert found.sum(axis=1).tolist() == [1, 1]
    assert (activation_shares(p_LE) * found).sum(axis=1).tolist() == pytest.approx([1 / 3, 1 / 2])


def test_the_smallest_prefix_is_the_answer_where_even_that_does_not_fit() -> None:
    p_LE, each = np.array([[0.2, 0.5, 0.3], [0.4, 0.4, 0.2]]), np.ones((1, 2, 3), dtype=np.int64)
    found = prefix_search(p_LE, each, np.array([1]), base_D=NOTHING, fill=1.0)
    assert found.tolist() == [[False, True, False], [True, False, False]]


def test_bad_input_is_named() -> None:
    one = np.ones((1, 1, 2), dtype=np.int64)
    with pytest.raises(ValueError, match=r"layer 0, expert 1 is nan"):
        prefix_search(np.array([[1.0, np.nan]]), one, np.array([2]), base_D=NOTHING, fill=1.0)
