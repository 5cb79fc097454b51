"""Spread within clusters, to compare clusterings by."""

from __future__ import annotations

import numpy as np


def unit(x_XD: np.ndarray) -> np.ndarray:
    """Scale each row to length 1; a row of zeros stays."""
    return np.array([row / max(float(np.sqrt(row @ row)), 1e-300) for row in x_XD])


def spread(features_ND: np.ndarray, labels_N: np.ndarray) -> float:
    """Return the sum over points of 1 - cosine to their cluster's centroid: what K-means makes small."""
    unit_ND = unit(features_ND)
    sums_KD = np.zeros((labels_N.max() + 1, unit_ND.shape[1]))
    np.add.at(sums_KD, labels_N, unit_ND)
    return float((1 - (unit_ND * unit(sums_KD)[labels_N]).sum(axis=1)).sum())
