"""Refused updates by reason, and how the terminal tells them."""

from __future__ import annotations

from fedmoe_core.simulation.directory.refusals import Refusals, by_reason
from fedmoe_core.simulation.progress import refusal_lines


def test_reasons_that_differ_in_numbers_are_one_and_the_most_frequent_is_first() -> None:
    items = [(1, {"client": 4, "reason": "unknown key"}), (1, {"client": 7, "reason": "nan at step 3"})]
    items += [(2, {"client": 9, "reason": "nan at step 12"}), (5, {"client": 7, "reason": "nan at step 1e-05"})]
    assert by_reason(items) == [
        Refusals("nan at step #", 3, (7, 9), 1, 5),
        Refusals("unknown key", 1, (4,), 1, 1),
    ]
    assert by_reason([(3, {"client": 0, "reason": "norm 12.5"})] * 2) == [Refusals("norm 12.5", 2, (0,), 3, 3)]
    assert by_reason([]) == []


def test_a_round_of_many_refusals_is_told_by_reason() -> None:
    few = [{"client": n, "reason": f"nan at step {n}"} for n in range(5)]
    assert refusal_lines(2, few) == [f"  refused client {n}: nan at step {n}" for n in range(5)]
    many = [{"client": n, "reason": f"nan at step {n}"} for n in range(90)] + [{"client": 7, "reason": "unknown key"}]
    assert refusal_lines(2, many) == [
        "  refused 90 clients (0, 1, 2, 3, 4 and 85 more): nan at step #",
        "  refused client 7: unknown key",
    ]
    varied = [{"client": n, "reason": chr(65 + n)} for n in range(8)]
    assert refusal_lines(2, varied)[-1] == "  refused 3 more, for 3 more reasons"
    assert len(refusal_lines(2, varied)) == 6
