"""FedMoE eqs. 4-6, and divergences, against plain re-statements and by hand."""

from __future__ import annotations

from math import log, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from similarity_restated import jensen_shannon, usage_divergence

from fedmoe_core.algorithms.fedmoe.similarity import (
    adjust_experts,
    cosine_similarity,
    most_similar,
    pooled_profile,
    recommended_change,
    weighted_profile,
)

RNG = np.random.default_rng(5)
PROFILES = RNG.random((5, 2, 4))


def test_eq4_is_the_cosine_over_all_layers_and_experts() -> None:
    found = cosine_similarity(PROFILES)
    for k in range(5):
        for a in range(5):
            dot = sum(PROFILES[k, i, j] * PROFILES[a, i, j] for i in range(2) for j in range(4))
            norms = sqrt((PROFILES[k] ** 2).sum()) * sqrt((PROFILES[a] ** 2).sum())
            assert found[k, a] == pytest.approx(dot / norms, abs=1e-12)
    assert np.allclose(found, found.T)
    assert cosine_similarity(np.zeros((2, 1, 3))).tolist() == [[0, 0], [0, 0]]


def test_the_most_similar_exclude_oneself_and_ties_go_to_the_smaller_index() -> None:
    similarity = np.array([[1.0, 0.5, 0.9, 0.5], [0.5, 1, 0, 0], [0.9, 0, 1, 0], [0.5, 0, 0, 1]])
    assert most_similar(similarity, 0, 2) == [2, 1]
    assert most_similar(similarity, 0, 9) == [2, 1, 3]
    assert most_similar(similarity[:1, :1], 0, 3) == []


@pytest.mark.parametrize(
    ("own", "others", "change"),
    [
        *[(4, [6, 8], 3), (4, [4, 5, 5], 1), (4, [5, 6], 1), (4, [4, 5], 0), (4, [], 0)],
        *[(6, [2, 2], -4), (4, [4, 3, 3], -1), (4, [2, 3], -1), (4, [3, 4], 0)],
    ],
)
def test_eq5_rounds_to_the_nearest_and_halves_towards_no_change(own: int, others: list[int], change: int) -> None:
    assert recommended_change(np.array([own, *others]), 0, range(1, len(others) + 1)) == change


def test_eq6_weighs_profiles_by_similarity() -> None:
    similarity_C = np.array([1.0, 0.2, 0.7, 0.0, 0.4])
    found = weighted_profile(PROFILES, similarity_C, [1, 2, 4])
    for i in range(2):
        for j in range(4):
            top = 0.2 * PROFILES[1, i, j] + 0.7 * PROFILES[2, i, j] + 0.4 * PROFILES[4, i, j]
            assert found[i, j] == pytest.approx(top / 1.3, abs=1e-12)
    assert np.allclose(weighted_profile(PROFILES, np.zeros(5), [0, 3]), (PROFILES[0] + PROFILES[3]) / 2)


def test_the_pooled_profile_weighs_by_data_volume() -> None:
    found = pooled_profile(PROFILES[:2], np.array([100, 300]))
    assert np.allclose(found, 0.25 * PROFILES[0] + 0.75 * PROFILES[1])


def test_additions_take_the_largest_phat_outside_within_the_limits() -> None:
    held = np.array([[True, False, False], [False, True, False]])
    phat = np.array([[0.9, 0.5, 0.1], [0.6, 0.9, 0.5]])
    assert adjust_experts(held, phat, 2).tolist() == [[True, True, False], [True, True, False]]
    costs = np.array([[[1, 1, 1], [9, 1, 1]]])
    # The first choice costs 9 of 4, so the next two of phat 0.5 come in.
    limited = adjust_experts(held, phat, 2, costs_DLE=costs, limits_D=np.array([4]))
    assert limited.tolist() == [[True, True, False], [False, True, True]]
    assert adjust_experts(held, phat, 99).all()
    assert (adjust_experts(held, phat, 0) == held).all()


def test_removals_take_the_smallest_phat_inside_and_never_a_layers_last() -> None:
    held = np.array([[True, True, True], [False, True, False]])
    phat = np.array([[0.3, 0.2, 0.9], [0.0, 0.1, 0.0]])
    assert adjust_experts(held, phat, -1).tolist() == [[True, False, True], [False, True, False]]
    assert adjust_experts(held, phat, -9).tolist() == [[False, False, True], [False, True, False]]
    assert held.sum() == 4  # the argument is untouched


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_jensen_shannon_equals_scipys_squared_distance(seed: int) -> None:
    rng = np.random.default_rng(seed)
    p, q = rng.random((2, 3, 6)) * (rng.random((2, 3, 6)) > 0.3)
    p[:, 0] = q[:, 1] = 0.5
    for layer, found in enumerate(jensen_shannon(p, q)):
        assert found == pytest.approx(jensenshannon(p[layer], q[layer]) ** 2, abs=1e-12)


def test_divergence_bounds() -> None:
    apart = np.array([[[1.0, 0.0]], [[0.0, 3.0]]])
    assert usage_divergence(apart) == pytest.approx([log(2)])
    assert usage_divergence(np.stack([PROFILES[0]] * 3)) == pytest.approx([0, 0], abs=1e-15)
    assert usage_divergence(PROFILES[:1]).tolist() == [0, 0]
    pairs = [jensen_shannon(PROFILES[a], PROFILES[b]) for a in range(5) for b in range(a)]
    assert np.allclose(usage_divergence(PROFILES), np.mean(pairs, axis=0))
