"""Secret sharing against brute force: any threshold of shares gives the secret, fewer fit every secret."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe_core.privacy.secure.shamir import PRIME, SHARE_BYTES, join, split, weights_at_zero


def drawing(seed: int = 0):
    return np.random.default_rng(seed).bytes


def interpolated(points: dict[int, int], place: int) -> int:
    """Lagrange's formula with fractions of the field, restated."""
    total = 0
    for x, y in points.items():
        term = y
        for other in points:
            if other != x:
                term = term * (place - other) % PRIME * pow((x - other) % PRIME, PRIME - 2, PRIME) % PRIME
        total += term
    return total % PRIME


@settings(max_examples=25, deadline=None)
@given(secret=st.binary(min_size=32, max_size=32), count=st.integers(1, 6), seed=st.integers(0, 99), data=st.data())
def test_every_set_of_threshold_shares_gives_the_secret(
    secret: bytes, count: int, seed: int, data: st.DataObject
) -> None:
    holders = data.draw(st.lists(st.integers(0, 10**6), min_size=count, max_size=count, unique=True))
    threshold = data.draw(st.integers(1, count))
    shares = split(secret, holders, threshold, drawing(seed))
    assert {len(share) for share in shares.values()} == {SHARE_BYTES}
    for chosen in combinations(holders, threshold):
        assert join(shares, weights_at_zero(chosen)) == secret
        points = {holder + 1: int.from_bytes(shares[holder], "big") for holder in chosen}
        assert interpolated(points, 0).to_bytes(32, "big") == secret


def test_fewer_shares_than_the_threshold_fit_every_secret() -> None:
    """With one share less, each secret has exactly one polynomial through it and the shares, so none is likelier."""
    shares = split(b"s" * 32, range(4), 3, drawing())
    known = {holder + 1: int.from_bytes(shares[holder], "big") for holder in (0, 2)}
    thirds = {interpolated({**known, 0: int.from_bytes(guess * 32, "big")}, 4) for guess in (b"a", b"b", b"s")}
    assert len(thirds) == 3
    assert int.from_bytes(shares[3], "big") in thirds


def test_a_changed_share_does_not_give_the_secret() -> None:
    shares, weights = split(b"s" * 32, range(3), 2, drawing()), weights_at_zero([0, 2])
    shares[2] = bytes([shares[2][0]]) + bytes([shares[2][1] ^ 1]) + shares[2][2:]
    with pytest.raises(ValueError, match="the shares are not of one secret; ask other holders"):
        join(shares, weights)


@pytest.mark.parametrize(
    ("secret", "holders", "threshold", "told"),
    [
        (b"short", [0, 1], 2, "a secret of 5 bytes is not of 32"),
        (b"s" * 32, [0, 0], 2, r"holders \[0, 0\] are not different numbers"),
        (b"s" * 32, [-1, 0], 2, r"holders \[-1, 0\] are not different numbers"),
        (b"s" * 32, [0, 1], 3, "threshold 3 of 2 holders cannot be met"),
        (b"s" * 32, [0, 1], 0, "threshold 0 of 2 holders cannot be met"),
    ],
)
def test_what_cannot_be_shared_is_refused(secret: bytes, holders: list[int], threshold: int, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        split(secret, holders, threshold, drawing())
