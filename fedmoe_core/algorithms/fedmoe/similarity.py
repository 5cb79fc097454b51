"""Similarity of clients by expert usage, and advice from the most similar ones (FedMoE, arXiv 2408.11304, eqs. 4-6)."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np


def cosine_similarity(profiles_CLE: np.ndarray) -> np.ndarray:
    """Return sim(k, a) = <p_k, p_a> / (|p_k| |p_a|) over layers and experts, (C, C): FedMoE eq. 4 [P].

    A client without any activation is like no client, not even itself (0).
    """
    flat_CN = profiles_CLE.reshape(len(profiles_CLE), -1).astype(np.float64)
    norm_C1 = np.linalg.norm(flat_CN, axis=1, keepdims=True)
    unit_CN = flat_CN / np.where(norm_C1 > 0, norm_C1, 1.0)
    return np.clip(unit_CN @ unit_CN.T, -1.0, 1.0)


def most_similar(similarity_CC: np.ndarray, client: int, count: int) -> list[int]:
    """Return S(k): the ``count`` clients most like ``client``, itself excluded; ties go to the smaller index [P]."""
    others = [other for other in range(len(similarity_CC)) if other != client]
    return sorted(others, key=lambda other: (-similarity_CC[client, other], other))[:count]


def recommended_change(experts_C: np.ndarray, client: int, similar: Sequence[int]) -> int:
    """Return n = mean(#experts of S(k)) - #experts(k): FedMoE eq. 5 [P]; positive adds, negative removes.

    The mean is a fraction and n a number of experts, so n is rounded to the nearest integer, halves towards no change
    [E]. Without similar clients, no change.
    """
    if not len(similar):
        return 0
    total = sum(int(experts_C[other]) for other in similar)
    gap = Fraction(total, len(similar)) - int(experts_C[client])
    size = -(-(2 * abs(gap) - 1) // 2)  # ceil(|gap| - 1/2)
    return int(size) if gap >= 0 else -int(size)


def weighted_profile(profiles_CLE: np.ndarray, similarity_C: np.ndarray, similar: Sequence[int]) -> np.ndarray:
    """Return sum_{a in S(k)} sim(k, a) p_ij(a) / sum_{a in S(k)} sim(k, a), (L, E), phat_ij(k) of FedMoE eq. 6 [P].

    Where the similarities add up to 0 the plain mean stands in [E].

    Args:
        profiles_CLE: activations of every client.
        similarity_C: sim(k, .) of the client in question.
        similar: S(k), at least one.
    """
    weight_S = similarity_C[list(similar)].astype(np.float64)
    return _mean(profiles_CLE[list(similar)], weight_S)


def pooled_profile(profiles_CLE: np.ndarray, samples_C: np.ndarray) -> np.ndarray:
    """Return sum_a |D_a| p(a) / sum_a |D_a|, (L, E): the profile of a client that cannot probe the full model [P].

    The paper takes the mean over clients with the same task, so give only those.
    """
    return _mean(profiles_CLE, samples_C.astype(np.float64))


def adjust_experts(
    held_LE: np.ndarray,
    phat_LE: np.ndarray,
    change: int,
    *,
    costs_DLE: np.ndarray | None = None,
    limits_D: np.ndarray | None = None,
) -> np.ndarray:
    """Apply FedMoE's advice, (L, E): n > 0 adds the n experts outside of largest phat, n < 0 removes |n| inside [P].

    Removal takes the smallest phat first. An addition that would exceed a limit is passed over for the next one, and
    the last expert of a layer is never removed [E]. Ties go to the smaller layer, then the smaller expert id.

    Args:
        held_LE: bool, the experts of the client now.
        phat_LE: eq. 6.
        change: n of eq. 5.
        costs_DLE, limits_D: integers, what an expert costs and what may be spent; None = no limit.
    """
    adjusted_LE = held_LE.copy()
    if change > 0:
        outside = [place for place in np.argsort(-phat_LE, axis=None, kind="stable") if not held_LE.flat[place]]
        for place in outside:
            if adjusted_LE.sum() == held_LE.sum() + change:
                break
            adjusted_LE.flat[place] = True
            if costs_DLE is not None and ((costs_DLE * adjusted_LE).sum(axis=(1, 2)) > limits_D).any():
                adjusted_LE.flat[place] = False
    elif change < 0:
        inside = [place for place in np.argsort(phat_LE, axis=None, kind="stable") if held_LE.flat[place]]
        for place in inside:
            if adjusted_LE.sum() == held_LE.sum() + change:
                break
            if adjusted_LE[place // held_LE.shape[1]].sum() > 1:
                adjusted_LE.flat[place] = False
    return adjusted_LE


def _mean(profiles_SLE: np.ndarray, weight_S: np.ndarray) -> np.ndarray:
    """Weighted mean over the first axis; the plain mean where the weights add up to nothing."""
    if not weight_S.sum() > 0:
        weight_S = np.ones_like(weight_S)
    return np.asarray(np.tensordot(weight_S / weight_S.sum(), profiles_SLE, axes=1))
