"""Text that can be seen: every character that acts or hides becomes an escape, and nothing else changes."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmoe_core.base import show
from fedmoe_core.base.wording import another_configuration, differing, nearest, unknown, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("Größe → 12 %, a\u00a0b", "Größe → 12 %, a\u00a0b"),
        ("\x1b[31m", "\\x1b[31m"),
        ("a\nb\tc\r", "a\\x0ab\\x09c\\x0d"),
        ("\x7f\x9b", "\\x7f\\x9b"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("\ufeff\u200b\u2066", "\\ufeff\\u200b\\u2066"),
        ("\u2028\u2029", "\\u2028\\u2029"),
        ("\udcff", "\\udcff"),
        ("\ue000\U000e0041\uffff", "\\ue000\\U000e0041\\uffff"),
        ("می\u200cخواهم", "می\u200cخواهم"),
        ("👩\u200d🔬", "👩\u200d🔬"),
    ],
)
def test_what_acts_or_hides_becomes_an_escape(text: str, shown: str) -> None:
    assert visible(text) == shown


@given(st.text(st.characters(codec=None, exclude_categories=())))
def test_visible_text_is_printable_and_stays_as_it_is(text: str) -> None:
    shown = visible(text)
    assert visible(shown) == shown
    assert all(unicodedata.category(sign)[0] != "C" or sign in "\u200c\u200d" for sign in shown)
    shown.encode("utf-8")
    if text.isprintable():
        assert shown == text


def test_the_nearest_word_whatever_its_case_or_none() -> None:
    assert nearest("mib", ["B", "MiB", "GiB"]) == "MiB"
    assert nearest("xyz", ["stdlib", "csv:FILE"]) is None
    assert str(unknown("data 'cvs:x'", "cvs:x", ["stdlib", "csv:FILE"])) == (
        "data 'cvs:x' is unknown; did you mean 'csv:x'? valid: stdlib, csv:FILE"
    )


@pytest.mark.parametrize("count", [0, 11, 1023.2, 1024, 10 * 1024 + 1, 9.999 * 2**20, 123.4 * 2**20, 2**40 + 1])
def test_a_size_rounded_up_is_enough(count: float) -> None:
    number, unit = show.size(count, up=True).split()
    shown = float(number) * {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}[unit]
    assert count <= shown <= max(1.011 * count, count + 1)


def test_two_mappings_differ_where_a_value_does_or_only_one_has_the_key() -> None:
    was, now = {"lr": 0.1, "gone": 1, "nothing": None}, {"lr": 0.2, "new": [1]}
    assert differing(was, now) == {"lr": (0.1, 0.2), "gone": (1, None), "nothing": (None, None), "new": (None, [1])}
    assert differing(was, dict(was)) == {}


def test_three_differences_are_named_and_the_others_counted() -> None:
    now = dict.fromkeys("abcde", 1)
    text = another_configuration(differing({"a": "x"}, now))
    assert text.startswith("another configuration (a = 'x' then, 1 now; b = absent then, 1 now; c = absent then, 1 now")
    assert text.endswith(" and 2 more)")
