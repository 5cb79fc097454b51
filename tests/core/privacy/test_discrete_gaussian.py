"""The exact sampler: its chances are those of the discrete Gaussian, and every block is drawn."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import chisquare, kstest

from fedmoe_core.base.rng import counter_rng
from fedmoe_core.privacy.chance import Draws, Secret
from fedmoe_core.privacy.discrete_gaussian import BLOCK, LARGEST_SIGMA, discrete_gaussian


def by_seed(seed: int) -> Draws:
    return counter_rng(seed, "test")


def by_secret(seed: int) -> Draws:
    return Secret(0, bytes([seed] * 32)).draws("test")


SOURCES = pytest.mark.parametrize("source", [by_seed, by_secret])


def drawn(sigma: int, size: int, rng: Draws) -> np.ndarray:
    return discrete_gaussian(sigma, size, rng)


@SOURCES
@pytest.mark.parametrize("sigma", [1, 2, 7])
def test_every_whole_number_comes_as_often_as_its_chance_says(sigma: int, source: Callable[[int], Draws]) -> None:
    size, places = 200_000, np.arange(-12 * sigma, 12 * sigma + 1)
    chance = np.exp(-(places**2) / (2 * sigma**2))
    chance /= chance.sum()
    drawn_N = drawn(sigma, size, source(0))
    found = np.array([(drawn_N == place).sum() for place in places])
    often = chance * size >= 5
    observed = np.append(found[often], found[~often].sum())
    expected = np.append(chance[often], chance[~often].sum()) * size
    assert found.sum() == size
    assert chisquare(observed, expected).pvalue > 1e-4


@SOURCES
def test_a_large_sigma_looks_normal_and_fills_every_residue(source: Callable[[int], Draws]) -> None:
    found = drawn(LARGEST_SIGMA, 100_000, source(0))
    assert kstest(found / LARGEST_SIGMA, "norm").pvalue > 1e-4
    assert chisquare(np.bincount(found & 15, minlength=16)).pvalue > 1e-4  # the low bits hide as well


@SOURCES
def test_equal_sources_draw_equally_and_blocks_do_not_repeat(source: Callable[[int], Draws]) -> None:
    found = drawn(1000, 2 * BLOCK + 3, source(0))
    assert np.array_equal(found, drawn(1000, 2 * BLOCK + 3, source(0)))
    assert not np.array_equal(found[:BLOCK], found[BLOCK : 2 * BLOCK])
    assert found[2 * BLOCK :].any()
    assert not np.array_equal(found, drawn(1000, 2 * BLOCK + 3, source(1)))


def test_no_sigma_is_no_noise_and_one_out_of_range_is_refused() -> None:
    assert not drawn(0, 10, by_seed(0)).any()
    for sigma in (-1, LARGEST_SIGMA + 1):
        with pytest.raises(ValueError, match=f"sigma = {sigma} of a discrete Gaussian is not from 0 to"):
            drawn(sigma, 1, by_seed(0))
