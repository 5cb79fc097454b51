"""The exact sampler: its chances are those of the discrete Gaussian, and every block is drawn."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import chisquare, kstest

from fedmoe_core.base.rng import counter_rng
from fedmoe_core.privacy.discrete_gaussian import BLOCK, LARGEST_SIGMA, discrete_gaussian


def drawn(sigma: int, size: int, seed: int = 0) -> np.ndarray:
    return discrete_gaussian(sigma, size, counter_rng(seed, "test"))


@pytest.mark.parametrize("sigma", [1, 2, 7])
def test_every_whole_number_comes_as_often_as_its_chance_says(sigma: int) -> None:
    size, places = 200_000, np.arange(-12 * sigma, 12 * sigma + 1)
    chance = np.exp(-(places**2) / (2 * sigma**2))
    chance /= chance.sum()
    found = np.array([(drawn(sigma, size) == place).sum() for place in places])
    often = chance * size >= 5
    observed = np.append(found[often], found[~often].sum())
    expected = np.append(chance[often], chance[~often].sum()) * size
    assert found.sum() == size
    assert chisquare(observed, expected).pvalue > 1e-4


def test_a_large_sigma_looks_normal_and_fills_every_residue() -> None:
    found = drawn(LARGEST_SIGMA, 100_000)
    assert kstest(found / LARGEST_SIGMA, "norm").pvalue > 1e-4
    assert chisquare(np.bincount(found & 15, minlength=16)).pvalue > 1e-4  # the low bits hide as well


def test_equal_seeds_draw_equally_and_blocks_do_not_repeat() -> None:
    found = drawn(1000, 2 * BLOCK + 3)
    assert np.array_equal(found, drawn(1000, 2 * BLOCK + 3))
    assert not np.array_equal(found[:BLOCK], found[BLOCK : 2 * BLOCK])
    assert found[2 * BLOCK :].any()
    assert not np.array_equal(found, drawn(1000, 2 * BLOCK + 3, seed=1))


def test_no_sigma_is_no_noise_and_one_out_of_range_is_refused() -> None:
    assert not drawn(0, 10).any()
    for sigma in (-1, LARGEST_SIGMA + 1):
        with pytest.raises(ValueError, match=f"sigma = {sigma} of a discrete Gaussian is not from 0 to"):
            drawn(sigma, 1)
