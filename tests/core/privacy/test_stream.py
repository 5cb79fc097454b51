"""Whole numbers from a key stream: the standard's cipher, every number as likely as the others, all its bits used."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy.stats import chisquare

from fedmoe_core.privacy.secure.ciphers import CHUNK, KeyStream
from fedmoe_core.privacy.stream import Stream

KEY = bytes(range(32))


def words_of(key: bytes, count: int) -> list[int]:
    """Counter mode by hand: the cipher of 0, 1, 2, ... as big-endian blocks, read as little-endian words."""
    counters = b"".join(number.to_bytes(16, "big") for number in range(-(-count // 2)))
    raw = Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(counters)
    return np.frombuffer(raw, dtype="<u8")[:count].tolist()


def test_the_words_are_aes_256_in_counter_mode_however_many_are_asked_for_at_once() -> None:
    stream, count = KeyStream(KEY), 2 * CHUNK + 7
    sizes = [1, 0, 2, 3, CHUNK + 1, count - CHUNK - 7]
    found = np.concatenate([stream.words(size) for size in sizes])
    assert found.dtype == np.uint64
    assert found.tolist() == words_of(KEY, count)


def restated(key: bytes, count: int, sizes: list[int]) -> list[list[int]]:
    """Each of ``count`` numbers has floor(2^64 / count) words; the others are drawn again, after all of a call."""
    words: Iterator[int] = iter(words_of(key, 4 * sum(sizes)))
    share, found = 2**64 // count, []
    for size in sizes:
        numbers = [next(words) // share for _ in range(size)]
        while over := [place for place, number in enumerate(numbers) if number >= count]:
            for place in over:
                numbers[place] = next(words) // share
        found.append(numbers)
    return found


@pytest.mark.parametrize("count", [2, 3, 10, 1 << 24, 5 << 49, 3 << 61, (1 << 63) - 1])
def test_each_number_is_a_word_through_the_same_share(count: int) -> None:
    stream, sizes = Stream(KEY), [5, 0, 1, 200]
    found = [stream.integers(-3, count - 3, size) for size in sizes]
    assert [[number + 3 for number in numbers.tolist()] for numbers in found] == restated(KEY, count, sizes)
    assert all(numbers.dtype == np.int64 for numbers in found)


def test_a_quarter_of_the_words_is_drawn_again_where_a_range_wants_it() -> None:
    """3 * 2^61 numbers have 2 words each, which leaves 2^62 of 2^64 words over: one of four."""
    again = sum(word // 2 >= 3 << 61 for word in words_of(KEY, 4000))
    assert 850 < again < 1150


@pytest.mark.parametrize("count", [2, 3, 7, 100])
def test_numbers_are_equally_likely(count: int) -> None:
    found = np.bincount(Stream(KEY).integers(0, count, 200_000), minlength=count)
    assert chisquare(found).pvalue > 1e-4


def test_every_bit_of_a_wide_range_moves() -> None:
    found = Stream(KEY).integers(0, 1 << 62, 20_000)
    shares = [(found >> bit & 1).mean() for bit in range(62)]
    assert max(abs(share - 0.5) for share in shares) < 4.5 * 0.5 / np.sqrt(20_000)
    assert len(np.unique(found)) == 20_000


def test_one_number_to_choose_from_takes_nothing_from_the_stream() -> None:
    one, other = Stream(KEY), Stream(KEY)
    assert one.integers(5, 6, 3).tolist() == [5, 5, 5]
    assert np.array_equal(one.integers(0, 9, 20), other.integers(0, 9, 20))


@pytest.mark.parametrize(
    ("low", "high"), [(0, 0), (3, 2), (0, (1 << 63) + 1), (-(1 << 63) - 1, 0), (-(1 << 62), 1 << 62)]
)
def test_a_range_that_has_no_numbers_or_too_many_is_refused(low: int, high: int) -> None:
    with pytest.raises(ValueError, match=f"from {low} to below {high} cannot be drawn; choose a range inside int64"):
        Stream(KEY).integers(low, high, 1)
