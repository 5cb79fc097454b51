"""Trading training for frozen experts that run: what is held, what learns, and that the room is the same."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from selection_cases import MODEL, SEEDS, subsets

from fedmoe_core.budget.limits import Budget
from fedmoe_core.selection.knapsack import select_top_n
from fedmoe_core.selection.within_budget import allowance_of, trade_for_frozen


@given(SEEDS, st.floats(0.05, 0.95), st.sampled_from(["memory", "down", "experts"]), st.integers(3, 12))
@settings(max_examples=40, deadline=None)
def test_inv8_trading_for_frozen_holds_the_best_that_fits(seed: int, share: float, resource: str, most: int) -> None:
    """Against every mask of held experts, the trained ones given; and the trained are the best of what could train."""
    rng = np.random.default_rng(seed)
    scores_LE = rng.uniform(0, 1, (3, 4))
    model = replace(MODEL, num_experts=4)
    n = int(rng.integers(3, 9))
    could_LE = select_top_n(scores_LE, n)
    cost = model.predict(could_LE, could_LE, local_steps=1)
    limit = {"memory": cost.memory_bytes, "down": cost.bytes_down, "experts": cost.experts}[resource]
    budget = Budget.parse(f"{resource}={limit}")
    allowance = allowance_of(budget, model)
    held_LE, learns_LE = trade_for_frozen(allowance, could_LE, scores_LE, share=share, most=most)
    assert budget.fits(model.predict(held_LE, learns_LE, local_steps=1))
    assert (learns_LE <= held_LE).all()
    assert learns_LE.any(axis=1).all()
    assert held_LE.sum() <= max(n, most)
    if n >= most:
        np.testing.assert_array_equal(held_LE, could_LE)
        np.testing.assert_array_equal(learns_LE, could_LE)
        return
    masks = subsets(3, 4)
    masks = masks[(masks >= learns_LE).all(axis=(1, 2))]
    masks = masks[masks.sum(axis=(1, 2)) <= most]
    fits = [mask for mask in masks if budget.fits(model.predict(mask, learns_LE, local_steps=1))]
    assert scores_LE[held_LE].sum() == pytest.approx(max(scores_LE[mask].sum() for mask in fits))
    if resource != "memory":  # a frozen expert takes as much of these as one that trains, so there is nothing to gain
        np.testing.assert_array_equal(learns_LE, held_LE)
        assert held_LE.sum() == n
    for mask in masks:  # nobody that only runs could train as well
        one = mask & held_LE
        if one.sum() == learns_LE.sum() + 1:
            assert not budget.fits(model.predict(held_LE, one, local_steps=1))


def test_trading_keeps_the_best_share_and_holds_four_for_one() -> None:
    scores_LE = np.arange(18.0).reshape(3, 6)
    could_LE = select_top_n(scores_LE, 8)
    # An expert of 16 bytes a parameter gives way to four of 4, but for the router row and what a slot keeps.
    model = replace(MODEL, hidden_size=256, train_router=False, slot_bytes=0, trunk=replace(MODEL.trunk, transients={}))
    limit = model.predict(could_LE, could_LE, local_steps=1).memory_bytes
    held_LE, learns_LE = trade_for_frozen(
        allowance_of(Budget(memory_bytes=limit), model), could_LE, scores_LE, share=0.75, most=18
    )
    assert learns_LE.sum() == 6
    assert held_LE.sum() == 6 + 2 * 4
    assert scores_LE[learns_LE].tolist() == [5, 11, 14, 15, 16, 17]  # one a layer, then the best
    assert scores_LE[held_LE & ~learns_LE].tolist() == [4, 6, 7, 8, 9, 10, 12, 13]
