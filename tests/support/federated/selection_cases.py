"""A small cost model for choosing experts, and every subset of them to compare with."""

from __future__ import annotations

from itertools import product

import numpy as np
from hypothesis import strategies as st

from fedmoe_core.budget.cost_model import CostModel, TrunkCost

SEEDS = st.integers(0, 2**32 - 1)


MODEL = CostModel(
    num_layers=3,
    num_experts=6,
    top_k=3,
    hidden_size=16,
    intermediate_size=8,
    tokens=32,
    trunk_params=500,
    trunk=TrunkCost(
        {1: (9000, 9000, 4000, 2000), 2: (12000, 12000, 5000, 2000), 3: (15000, 14000, 12000, 4000)},
        flops_per_token=100.0,
    ),
)


def subsets(layers: int, experts: int) -> np.ndarray:
    """Every mask with at least one expert per layer, (N, L, E)."""
    layer = [bits for bits in product([False, True], repeat=experts) if any(bits)]
    return np.array(list(product(layer, repeat=layers)))
