"""The assignments that FLEX-MoE's program is compared with."""

from __future__ import annotations

import numpy as np


def greedy(scores_CE: np.ndarray, counts_C: np.ndarray) -> np.ndarray:
    """Choose each client's k_c best experts (C, E), whatever the load: the baseline; ties go to the smaller id [N]."""
    rank_CE = np.argsort(np.argsort(-scores_CE, axis=1, kind="stable"), axis=1, kind="stable")
    return rank_CE < counts_C[:, None]


def random_experts(counts_C: np.ndarray, experts: int, rng: np.random.Generator) -> np.ndarray:
    """Draw k_c experts of each client uniformly (C, E): the other baseline."""
    return greedy(rng.random((len(counts_C), experts)), counts_C)
