"""How differently two clients use experts."""

from __future__ import annotations

import numpy as np


def jensen_shannon(p_X: np.ndarray, q_X: np.ndarray) -> np.ndarray:
    """Return the Jensen-Shannon divergence over the last axis, nats: 0 for equal, log 2 for disjoint distributions.

    Rows are normalised first; a row of zeros is taken as uniform.
    """
    p, q = _distribution(p_X), _distribution(q_X)
    middle = (p + q) / 2
    return np.maximum((_relative_entropy(p, middle) + _relative_entropy(q, middle)) / 2, 0.0)


def usage_divergence(profiles_CLE: np.ndarray) -> np.ndarray:
    """Return the clients' mean pairwise Jensen-Shannon divergence of usage, per layer (L,): how client-specific it is.

    One client alone diverges from no other (0).
    """
    first, second = np.triu_indices(len(profiles_CLE), k=1)
    if not len(first):
        return np.zeros(profiles_CLE.shape[1])
    return jensen_shannon(profiles_CLE[first], profiles_CLE[second]).mean(axis=0)


def _distribution(p_X: np.ndarray) -> np.ndarray:
    total = p_X.sum(axis=-1, keepdims=True)
    return np.where(total > 0, p_X / np.where(total > 0, total, 1.0), 1.0 / p_X.shape[-1])


def _relative_entropy(p_X: np.ndarray, q_X: np.ndarray) -> np.ndarray:
    """KL(p || q) over the last axis, 0 log 0 = 0; q must be positive where p is."""
    inside = p_X > 0
    ratio = np.where(inside, p_X, 1.0) / np.where(inside, q_X, 1.0)
    return np.asarray((p_X * np.log(ratio)).sum(axis=-1))
