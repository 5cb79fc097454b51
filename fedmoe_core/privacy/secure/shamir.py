"""Shamir's secret sharing: any ``threshold`` shares give the secret, fewer say nothing about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

PRIME = (1 << 521) - 1  # a Mersenne prime; secrets of 32 bytes lie far below it
SHARE_BYTES = 66
SECRET_BYTES = 32
Draw = Callable[[int], bytes]  # so many random bytes


def split(secret: bytes, holders: Sequence[int], threshold: int, draw: Draw) -> dict[int, bytes]:
    """Cut a secret of ``SECRET_BYTES`` into one share of ``SHARE_BYTES`` for each holder (Shamir 1979).

    A share is the value at holder + 1 of a polynomial of degree threshold - 1 over the field, whose value at 0 is the
    secret. 600 random bits give a coefficient with a bias below 2^-79.

    Raises:
        ValueError: a secret of another length, a holder twice or below 0, or fewer holders than the threshold.
    """
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"a secret of {len(secret)} bytes is not of {SECRET_BYTES}; share one of that length")
    if len(set(holders)) < len(holders) or min(holders, default=-1) < 0:
        raise ValueError(f"holders {sorted(holders)} are not different numbers from 0 up; number them so")
    if not 1 <= threshold <= len(holders):
        raise ValueError(f"threshold {threshold} of {len(holders)} holders cannot be met; choose 1 to {len(holders)}")
    polynomial = [int.from_bytes(secret, "big")]
    polynomial += [int.from_bytes(draw(75), "big") % PRIME for _ in range(threshold - 1)]
    return {holder: _value(polynomial, holder + 1).to_bytes(SHARE_BYTES, "big") for holder in holders}


def _value(polynomial: Sequence[int], place: int) -> int:
    value = 0
    for coefficient in reversed(polynomial):
        value = (value * place + coefficient) % PRIME
    return value


def weights_at_zero(holders: Sequence[int]) -> dict[int, int]:
    """Return Lagrange's weights: the value at 0 is the sum of weight x share, over exactly these holders."""
    weights = {}
    for holder in holders:
        above = below = 1
        for other in holders:
            if other != holder:
                above = above * (other + 1) % PRIME
                below = below * (other - holder) % PRIME
        weights[holder] = above * pow(below, -1, PRIME) % PRIME
    return weights


def join(shares: Mapping[int, bytes], weights: Mapping[int, int]) -> bytes:
    """Return the secret of ``threshold`` shares by holder, with the weights of exactly these holders.

    Raises:
        ValueError: the shares are not of one secret of ``SECRET_BYTES``.
    """
    secret = sum(weight * int.from_bytes(shares[holder], "big") for holder, weight in weights.items()) % PRIME
    if secret >> (8 * SECRET_BYTES):
        raise ValueError("the shares are not of one secret; ask other holders")
    return secret.to_bytes(SECRET_BYTES, "big")
