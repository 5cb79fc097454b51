"""Flux eqs. 3 and 4, the roles, and gradients seen through forward passes alone."""

from __future__ import annotations

from itertools import combinations
from math import sqrt

import numpy as np
import pytest
import torch
from torch import Tensor

from fedmoe_core.algorithms.flux.utility import assign_roles, exploit_share, first_utility, spsa, utility
from fedmoe_core.base.rng import counter_seed


def test_eq3_by_loops() -> None:
    rng = np.random.default_rng(0)
    grads = {(layer, e): rng.standard_normal((int(rng.integers(0, 5)), 7)) for layer in range(2) for e in range(3)}
    tokens, squares, expected = np.zeros((2, 3)), np.zeros((2, 3)), np.zeros((2, 3))
    for place, samples in grads.items():
        tokens[place], squares[place] = len(samples), (samples**2).sum()
        if len(samples):
            expected[place] = len(samples) * sqrt(sum(float(g @ g) for g in samples) / len(samples))
    assert np.allclose(utility(tokens, squares), expected)
    assert utility(np.zeros((1, 1)), np.array([[np.nan]])).tolist() == [[0.0]]


def test_round_one_takes_frequencies() -> None:
    assert np.allclose(first_utility(np.array([[1.0, 3.0], [0.0, 4.0]])), [[0.125, 0.375], [0, 0.5]])
    assert first_utility(np.zeros((2, 2))).tolist() == [[0.25, 0.25]] * 2


def test_epsilon_grows_to_its_most() -> None:
    shares = [exploit_share(t, start=0.3, step=0.2, most=0.8) for t in range(5)]
    assert shares == pytest.approx([0.3, 0.5, 0.7, 0.8, 0.8])
    with pytest.raises(ValueError, match="epsilon must grow within"):
        exploit_share(0, start=1.2, step=0.1, most=1.0)


def test_eq4_is_the_top_of_each_client() -> None:
    """With epsilon 1 the roles are the best set of at most B experts, by brute force."""
    rng = np.random.default_rng(1)
    u = rng.random((2, 4))
    for count in range(1, 9):
        roles = assign_roles(u, count, 1.0, rng=rng)
        best = max(u.ravel()[list(some)].sum() for some in combinations(range(8), count))
        assert u[roles.exploit_LE].sum() == pytest.approx(best)
        assert not roles.explore_LE.any()


@pytest.mark.parametrize(("epsilon", "count", "trained"), [(0.0, 4, 1), (0.3, 10, 3), (0.7, 10, 7), (0.5, 5, 3)])
def test_roles_split_the_budget(epsilon: float, count: int, trained: int) -> None:
    u = np.random.default_rng(2).random((3, 8))
    roles = assign_roles(u, count, epsilon, rng=np.random.default_rng(3))
    assert roles.exploit_LE.sum() == trained
    assert (roles.exploit_LE | roles.explore_LE).sum() == count
    assert not (roles.exploit_LE & roles.explore_LE).any()
    assert u[roles.exploit_LE].min() > u[~roles.exploit_LE].max()
    again = assign_roles(u, count, epsilon, rng=np.random.default_rng(3))
    assert (again.explore_LE == roles.explore_LE).all()


def test_exploration_is_uniform_over_the_others() -> None:
    u = np.arange(8.0).reshape(2, 4)
    rng = np.random.default_rng(4)
    met = sum(assign_roles(u, 4, 0.5, rng=rng).explore_LE.astype(int) for _ in range(3000))
    assert np.asarray(met).ravel()[6:].tolist() == [0, 0]
    assert np.abs(np.asarray(met).ravel()[:6] / 3000 - 1 / 3).max() < 0.04
    with pytest.raises(ValueError, match=r"9 tuned experts is outside 1\.\.8"):
        assign_roles(u, 9, 0.5, rng=rng)


def quadratic(size: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(size, size, generator=generator, dtype=torch.float64) / size**0.5
    return root @ root.T, torch.randn(size, generator=generator, dtype=torch.float64), torch.ones(size).double()


def test_spsa_by_loops() -> None:
    """On a quadratic the central difference is <g, z> exactly, whatever sigma."""
    matrix, vector, weights = quadratic(12)
    gradient = matrix @ weights + vector
    found = spsa(lambda w: float(w @ matrix @ w / 2 + vector @ w), weights, sigma=0.3, probes=5, seed=8)
    squares = 0.0
    for probe in range(5):
        generator = torch.Generator().manual_seed(counter_seed(8, "spsa", probe))
        z = torch.randn(12, generator=generator, dtype=torch.float64)
        squares += float(gradient @ z) ** 2 / 5
    assert found == pytest.approx(squares, rel=1e-10)
    assert weights.tolist() == [1.0] * 12


def test_spsa_is_unbiased_in_the_squared_norm() -> None:
    matrix, vector, weights = quadratic(12)
    gradient = matrix @ weights + vector
    found = spsa(lambda w: float(w @ matrix @ w / 2 + vector @ w), weights, probes=4000, seed=1)
    assert found == pytest.approx(float(gradient @ gradient), rel=5 * sqrt(2 / 4000))


def test_spsa_ranks_experts_as_their_true_gradients_do() -> None:
    """What Flux needs of it: eight experts whose gradients differ by factors of two, four probes each."""
    slopes = [2.0**-e * torch.ones(5, 4) for e in range(8)]
    hits = 0
    for seed in range(20):
        found = [
            spsa(lambda w, s=s: float((w * s).sum()), torch.zeros(5, 4), seed=seed * 8 + e)
            for e, s in enumerate(slopes)
        ]
        hits += set(np.argsort(found)[-4:]) == {0, 1, 2, 3}
    assert hits >= 12


def test_spsa_names_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"sigma=0, probes=4"):
        spsa(lambda w: 0.0, torch.zeros(1), sigma=0, seed=0)
    with pytest.raises(ValueError, match="probe 0: the loss near the weights is not finite"):
        spsa(lambda w: float("inf"), torch.zeros(1), seed=0)
