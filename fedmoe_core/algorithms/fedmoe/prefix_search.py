"""FedMoE's expert search (arXiv 2408.11304, eq. 3): the most used experts of every layer, as deep as memory goes."""

from __future__ import annotations

import math

import numpy as np

NARROWEST = 1e-9  # width of theta's last interval


def activation_shares(p_LE: np.ndarray) -> np.ndarray:
    """Return p of every layer divided by the layer's sum [E].

    The paper's p_ij = n_ij / N sums to 1 in each layer because its router is top-1; under top-k it sums to k, and theta
    in [0, 1] needs shares. A layer without any activation gives every expert the same share.

    Raises:
        ValueError: a value is negative or not finite.
    """
    if not (np.isfinite(p_LE) & (p_LE >= 0)).all():
        layer, expert = np.argwhere(~(np.isfinite(p_LE) & (p_LE >= 0)))[0]
        raise ValueError(f"p of layer {layer}, expert {expert} is {p_LE[layer, expert]}; give activations >= 0")
    total_L1 = p_LE.sum(axis=1, keepdims=True)
    return np.where(total_L1 > 0, p_LE / np.where(total_L1 > 0, total_L1, 1.0), 1.0 / p_LE.shape[1])


def prefixes(p_LE: np.ndarray, theta: float) -> np.ndarray:
    """Take in each layer the fewest experts, by descending p, whose shares add up to theta; at least one (L, E).

    Ties go to the smaller expert id. A sum that misses theta only by rounding counts as having reached it.
    """
    shares_LE = activation_shares(p_LE)
    order_LE = np.argsort(-shares_LE, axis=1, kind="stable")
    reached_LE = np.cumsum(np.take_along_axis(shares_LE, order_LE, axis=1), axis=1) >= theta - 1e-12
    # The first place that reaches theta ends the prefix; rounding may leave the last sum short of 1.
    length_L = np.where(reached_LE.any(axis=1), reached_LE.argmax(axis=1) + 1, p_LE.shape[1])
    chosen_LE = np.zeros(p_LE.shape, dtype=bool)
    np.put_along_axis(chosen_LE, order_LE, np.arange(p_LE.shape[1]) < length_L[:, None], axis=1)
    return chosen_LE


def prefix_search(
    p_LE: np.ndarray, costs_DLE: np.ndarray, limits_D: np.ndarray, *, base_D: np.ndarray, fill: float
) -> np.ndarray:
    """Solve FedMoE eq. 3 [P]: the most used experts of every layer, as deep as all limits allow, bool (L, E).

    That is max theta with sum_j x_ij p_ij >= theta in each layer and min(sum_ij x_ij w_ij + w_d) <= a*M. The search
    bisects theta in [0, 1], as the paper does: where the descending-p prefixes of each layer fit, theta may rise.
    Prefixes are nested, so this finds the best theta of all prefixes; with experts of one size no other set does
    better [D]. With unequal sizes another set may, the general problem being NP-hard. The smallest prefix has one
    expert per layer, so routing never runs empty [E]. Memory is one row of D: bytes down and up and a plain count are
    limits of the same kind. Where even the smallest prefix does not fit, it is the answer.

    Args:
        p_LE: activations of each expert on validation data, in any unit.
        costs_DLE: integers >= 0, w_ij.
        limits_D: integers, M.
        base_D: integers, w_d, spent before any expert.
        fill: a in (0, 1]; 1 - a of every limit is kept for growth in later rounds.
    """
    room_D = np.array([math.floor(fill * int(limit)) for limit in limits_D], dtype=np.int64) - base_D

    def fits(chosen_LE: np.ndarray) -> bool:
        return bool(((costs_DLE * chosen_LE).sum(axis=(1, 2)) <= room_D).all())

    low, high = 0.0, 1.0
    if fits(prefixes(p_LE, high)):
        low = high
    while high - low > NARROWEST:
        middle = (low + high) / 2
        low, high = (middle, high) if fits(prefixes(p_LE, middle)) else (low, middle)
    return prefixes(p_LE, low)
