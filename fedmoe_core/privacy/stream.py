"""Whole numbers below a bound from a cipher's key stream, none likelier than another, and nothing else in between.

numpy's generators have 128 bits of state and are made for statistics: their output may be turned back.
"""

from __future__ import annotations

import numpy as np

from fedmoe_core.privacy.secure.ciphers import KeyStream

WORDS = 1 << 64  # so many values a word of the stream has


class Stream:
    """Draws as ``chance.Draws``; equal keys give equal draws on every machine.

    Args:
        key: 32 bytes, of this stream alone.
    """

    def __init__(self, key: bytes) -> None:
        self._stream = KeyStream(key)

    def integers(self, low: int, high: int, size: int) -> np.ndarray:
        """Draw ``size`` whole numbers from ``low`` to below ``high``, int64.

        Each of n = high - low values gets floor(2^64 / n) of the 2^64 words of 64 bits; the words that are left over,
        fewer than n, are drawn again.

        Raises:
            ValueError: the range is empty, or does not fit into int64.
        """
        count = high - low
        if not (0 < count < WORDS >> 1 and low >= -(WORDS >> 1) and high <= WORDS >> 1):
            raise ValueError(f"whole numbers from {low} to below {high} cannot be drawn; choose a range inside int64")
        if count == 1:
            return np.full(size, low, dtype=np.int64)
        share = np.uint64(WORDS // count)
        found_N = self._stream.words(size) // share
        while len(over := np.flatnonzero(found_N >= count)):
            found_N[over] = self._stream.words(len(over)) // share
        return found_N.astype(np.int64) + low
