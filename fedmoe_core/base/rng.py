"""Counter-based random numbers: a draw depends on what it is for, never on what was drawn before it."""

from __future__ import annotations

from hashlib import sha256

import numpy as np


def counter_rng(seed: int, purpose: str, *where: int) -> np.random.Generator:
    """Make a fresh generator for one purpose at one place (round, client, class, ...).

    Equal arguments give equal streams on every machine; nothing global is read or written.

    Args:
        seed: the run's seed, >= 0.
        purpose: a word that keeps the streams of different uses apart.
        where: non-negative coordinates of this use.

    Raises:
        ValueError: ``seed`` or a coordinate is negative.
    """
    if seed < 0 or any(place < 0 for place in where):
        raise ValueError(f"seed {seed} and coordinates {where} of random draws must be >= 0; use a non-negative seed")
    word = int.from_bytes(sha256(purpose.encode()).digest()[:4], "big")
    # The length goes in too: SeedSequence pads with zeros, so that () and (0,) would give the same stream.
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, word, len(where), *where])))


def counter_seed(seed: int, purpose: str, *where: int) -> int:
    """Return an integer seed below 2^63 by the same rule, for libraries that bring their own generators."""
    return int(counter_rng(seed, purpose, *where).integers(2**63))
