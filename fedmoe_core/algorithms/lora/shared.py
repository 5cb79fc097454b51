"""What HetLoRA and FlexLoRA share: plans of all experts under adapters, and what is not counted."""

from __future__ import annotations

import numpy as np

from fedmoe_core.server.state import Population

UNCOUNTED = (
    "a budget in experts cannot be kept, since every expert is resident; such a client gets its share of the ranks and "
    "the run is shown as not inside the budgets",
    "the trunk follows train.trunk, as in every other system",
)


def everything(population: Population) -> np.ndarray:
    """Return every expert of every layer, bool (L, E)."""
    return np.ones((population.spec.num_layers, population.spec.num_experts), dtype=bool)
