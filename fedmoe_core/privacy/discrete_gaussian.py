"""Whole numbers from the discrete Gaussian, sampled exactly: no floating-point number decides what is drawn.

Canonne, Kamath and Steinke 2020 (arXiv 2004.00010), algorithms 1 to 3 [N], over arrays. All chance comes from whole
numbers below a bound, drawn without bias. The noise of a floating-point sampler leaks in its
low bits what it should hide (Mironov 2012).
"""

from __future__ import annotations

import numpy as np

from fedmoe_core.privacy.chance import Draws

# (|y| - sigma)^2 of a proposal must stay below 2^63: |y| < 2^31 is sigma * 128 here, and a proposal beyond that has a
# chance of e^-127.
LARGEST_SIGMA = 1 << 24
BLOCK = 1 << 16  # numbers drawn at once: the few arrays of a block stay in cache


def discrete_gaussian(sigma: int, size: int, rng: Draws) -> np.ndarray:
    """Draw ``size`` whole numbers with P(y) proportional to exp(-y^2 / (2 sigma^2)), int64.

    Args:
        sigma: from 0, which gives zeros, to ``LARGEST_SIGMA``.
        size: how many.
        rng: the only source of chance.

    Raises:
        ValueError: ``sigma`` is out of range.
    """
    if not 0 <= sigma <= LARGEST_SIGMA:
        raise ValueError(f"sigma = {sigma} of a discrete Gaussian is not from 0 to {LARGEST_SIGMA}; choose one")
    found = np.zeros(size, dtype=np.int64)
    for start in range(0, size if sigma else 0, BLOCK):
        part = found[start : start + BLOCK]
        filled = 0
        while filled < len(part):
            # Of 100 proposals about 48 are kept.
            drawn = _proposals(sigma, 2 * (len(part) - filled) + 64, rng)
            excess = np.abs(drawn) - sigma
            kept = drawn[_happens(excess * excess, 2 * sigma * sigma, rng)][: len(part) - filled]
            part[filled : filled + len(kept)] = kept
            filled += len(kept)
    return found


def _proposals(scale: int, count: int, rng: Draws) -> np.ndarray:
    """Draw from the discrete Laplace, P(y) proportional to exp(-|y| / scale): algorithm 2. Some are lost."""
    low = rng.integers(0, scale, count)
    low = low[_happens(low, scale, rng)]
    high = np.zeros(len(low), dtype=np.int64)
    going = np.arange(len(low))
    while len(going):  # a geometric number of successes of chance 1 / e
        going = going[_happens(np.full(len(going), 1), 1, rng)]
        high[going] += 1
    size, negative = low + scale * high, rng.integers(0, 2, len(low)) == 1
    kept = ~(negative & (size == 0))  # zero would come twice
    return np.where(negative, -size, size)[kept]


def _happens(above: np.ndarray, below: int, rng: Draws) -> np.ndarray:
    """Let each event happen with chance exp(-above / below): algorithm 1; bool, one for each of ``above`` >= 0."""
    whole, rest = np.divmod(above, below)
    happens = _below_one(rest, below, rng)
    going = np.flatnonzero(happens & (whole > 0))
    while len(going):  # exp(-1) once for each whole unit
        lucky = _below_one(np.full(len(going), below), below, rng)
        happens[going[~lucky]] = False
        going = going[lucky]
        whole[going] -= 1
        going = going[whole[going] > 0]
    return happens


def _below_one(above: np.ndarray, below: int, rng: Draws) -> np.ndarray:
    """The same for 0 <= above <= below: count how often Bernoulli(x / k) succeeds for k = 1, 2, ...; even is yes."""
    odd = np.zeros(len(above), dtype=bool)
    going, k = np.arange(len(above)), 1
    while len(going):
        going = going[rng.integers(0, below * k, len(going)) < above[going]]
        odd[going] ^= True
        k += 1
    return ~odd
