"""Equal experts in every layer: as many in all at most, the held ones first, by score, with nothing of others left."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedmoe_core.budget.limits import Budget, Cost
from fedmoe_core.exporting.judged import equal_experts
from fedmoe_core.messages.plan import ExpertPlan, Extras


def plan_of(held_LE: np.ndarray, *, top_k: int = 2, extras: Extras | None = None) -> ExpertPlan:
    work = dict(client=1, round=3, top_k=top_k, local_steps=1, seed=0, budget=Budget(), predicted=Cost())
    return ExpertPlan(permitted_LE=held_LE, trainable_LE=held_LE.copy(), extras=extras or Extras(), **work)


@pytest.mark.parametrize("seed", range(20))
def test_never_more_in_all_the_best_of_the_held_and_then_the_best_of_the_rest(seed):
    rng = np.random.default_rng(seed)
    held_LE = rng.random((5, 9)) < rng.random((5, 1))
    held_LE[np.arange(5), rng.integers(0, 9, 5)] = True
    scores_LE = rng.standard_normal((5, 9))
    found = equal_experts(plan_of(held_LE), scores_LE)
    count = held_LE.sum() // 5
    assert (found.permitted_LE.sum(axis=1) == count).all()
    assert found.permitted_LE.sum() <= held_LE.sum()
    assert found.top_k == min(2, count)
    assert not (found.trainable_LE & ~held_LE).any()
    for kept_E, held_E, score_E in zip(found.permitted_LE, held_LE, scores_LE, strict=True):
        order = sorted(range(9), key=lambda e, held_E=held_E, score_E=score_E: (not held_E[e], -score_E[e]))
        assert set(np.flatnonzero(kept_E)) == set(order[:count])


def test_equal_layers_stay_and_rows_of_experts_that_go_go_with_them():
    held_LE = np.array([[True, True, False], [False, False, True]])
    row = torch.zeros(2)
    rows = {"moe.0.router": dict.fromkeys(range(3), row), "moe.0.w_in": {0: row, 1: row}, "moe.1.w_in": {2: row}}
    found = equal_experts(plan_of(held_LE, extras=Extras(rows=rows)), np.array([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]]))
    assert found.permitted_LE.tolist() == [[False, True, False], [False, False, True]]
    assert {key: sorted(own) for key, own in found.extras.rows.items()} == {
        "moe.0.router": [0, 1, 2],  # a row of a gate may be of an expert that is not held
        "moe.0.w_in": [1],
        "moe.1.w_in": [2],
    }
    assert equal_experts(found, np.zeros((2, 3))).permitted_LE.tolist() == found.permitted_LE.tolist()


def test_merged_experts_are_refused():
    alias_LE = np.array([[-1, 0, -1], [-1, -1, 1]])
    held_LE = np.array([[True, False, False], [True, True, False]])
    with pytest.raises(ValueError, match="client 1: absent experts are served by merged ones"):
        equal_experts(plan_of(held_LE, extras=Extras(alias_LE=alias_LE)), np.zeros((2, 3)))
