"""The closed forms of a cohort's memory: gradients that are there early, and what clients measure after training."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedmoe_core.budget.cohort_memory import Share, cohort_memory, probing_memory
from fedmoe_core.budget.cost_model import CostModel
from fedmoe_core.budget.trunk_cost import TrunkCost

LAYERS, EXPERTS, H, WIDTH = 3, 4, 8, 16
STAGES = (1000, 700, 400, 100)  # transients fall towards the first layer
COSTS = CostModel(LAYERS, EXPERTS, 2, H, WIDTH, tokens=16, trunk_params=50, trunk=TrunkCost(transients={2: STAGES}))
EVERY_LE = np.ones((LAYERS, EXPERTS), dtype=bool)
GRADIENT = (3 * H * WIDTH + H) * 4  # of one expert and its router row


def test_early_gradients_are_all_there_in_every_stage() -> None:
    late, early = (Share(COSTS, EVERY_LE, EVERY_LE, 2, early=early) for early in (False, True))
    whole, *stages = late.bytes()
    whole_early, *stages_early = early.bytes()
    assert whole_early == whole
    layer = EXPERTS * GRADIENT
    assert stages_early == [stages[0] + 4 * layer, stages[1] + 3 * layer, stages[2] + 2 * layer, stages[3] + layer]


@pytest.mark.parametrize("declared", [0, 10**9])
def test_a_probe_finds_what_was_trained_and_one_sub_model(declared: int) -> None:
    few_LE = EVERY_LE & (np.arange(EXPERTS) < 2)
    shares = [Share(COSTS, EVERY_LE, few_LE, 2), Share(COSTS, few_LE, few_LE, 2)]
    weights = 2 * LAYERS * 2 * GRADIENT  # six experts of either client
    alone = COSTS.memory(EVERY_LE, few_LE, top_k=2) - 6 * COSTS.state_bytes
    assert probing_memory(shares, [(shares[0], declared)]) == weights + max(alone, declared)
    assert probing_memory(shares, []) == 0
    # A step of the same cohort needs more, unless the plan has declared something large.
    step = cohort_memory(replace(COSTS), shares, STAGES)
    assert (probing_memory(shares, [(share, declared) for share in shares]) < step) == (declared == 0)
