"""The exact solvers: the best n experts, and the best set that additive resources allow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from fedmoe_core.budget.limits import BudgetError

INFEASIBLE = 2  # scipy's status of a program without a solution


def select_top_n(scores_LE: np.ndarray, n: int) -> np.ndarray:
    """Return argmax over |A| <= n of the sum of scores over A: HFedMoE eq. 15 [N], exact.

    Every layer keeps at least its best expert; the rest of n goes to the highest scores of all layers. A negative score
    is taken only to keep a layer alive, as eq. 15 implies. Ties go to the smaller layer, then the smaller expert id. To
    leave out an expert that no token of the client reached (E_union of eq. 15), give it a negative score.

    Raises:
        ValueError: a score is not finite; n below the number of layers.

    Example:
        >>> scores = np.array([[3.0, 1.0], [2.0, 5.0]])  # two layers of two experts
        >>> select_top_n(scores, 3)
        array([[ True, False],
               [ True,  True]])
    """
    _require_finite(scores_LE)
    layers, experts = scores_LE.shape
    if n < layers:
        raise ValueError(f"{n} experts cannot cover {layers} MoE layers; allow at least {layers}")
    chosen_LE = np.zeros((layers, experts), dtype=bool)
    chosen_LE[np.arange(layers), scores_LE.argmax(axis=1)] = True
    order = np.argsort(-scores_LE, axis=None, kind="stable")
    rest = order[~chosen_LE.ravel()[order] & (scores_LE.ravel()[order] >= 0)]
    chosen_LE.ravel()[rest[: n - int(chosen_LE.sum())]] = True
    return chosen_LE


def knapsack(values_LE: np.ndarray, costs_DLE: np.ndarray, limits_D: Sequence[int]) -> np.ndarray:
    """Choose the most valuable set (L, E) within D additive limits, at least one expert per layer [E]; exact.

    Where every binding resource costs the same for all experts this is ``select_top_n`` with the smallest count;
    otherwise an integer program (HiGHS). Negative values are taken only to keep a layer alive. Among sets of equal
    value the result is filled up in index order with what fits and costs no value, so a value of 0 does not starve a
    client that has room.

    Args:
        values_LE: float, finite.
        costs_DLE: integers >= 0 (bytes, counts).
        limits_D: integers.

    Raises:
        ValueError: no set has one expert per layer within all limits, or an input is malformed.

    Example:
        >>> values = np.array([[3.0, 1.0], [2.0, 5.0]])  # two layers of two experts
        >>> bytes_each = np.array([[[4, 1], [1, 4]]])
        >>> knapsack(values, bytes_each, [6])
        array([[False,  True],
               [ True,  True]])
    """
    _require_finite(values_LE)
    if not np.issubdtype(costs_DLE.dtype, np.integer) or (costs_DLE < 0).any():
        raise ValueError("costs are not integers >= 0; give bytes or counts")
    limits = np.asarray(limits_D, dtype=np.int64)
    least_D = costs_DLE.min(axis=2).sum(axis=1)
    if (least_D > limits).any():
        row = int(np.flatnonzero(least_D > limits)[0])
        raise BudgetError(
            f"limit {limits[row]} cannot hold one expert per MoE layer; at least {least_D[row]} is needed"
        )
    # A row that even the whole model respects cannot bind.
    binding_D = costs_DLE.sum(axis=(1, 2)) > limits
    costs_DLE, limits = costs_DLE[binding_D], limits[binding_D]
    uniform = [
        (int(cost.flat[0]), int(limit)) for cost, limit in zip(costs_DLE, limits, strict=True) if np.ptp(cost) == 0
    ]
    count = min([values_LE.size, *(limit // cost for cost, limit in uniform)])
    # Optimal where only the uniform rows count; if it happens to respect the others too, it is optimal for all.
    chosen_LE = select_top_n(values_LE, count)
    if respects(chosen_LE, costs_DLE, limits):
        return chosen_LE
    chosen_LE = _integer_program(values_LE, costs_DLE, limits)
    for place in np.argsort(-values_LE, axis=None, kind="stable"):
        if values_LE.flat[place] >= 0 and not chosen_LE.flat[place]:
            chosen_LE.flat[place] = True
            if not respects(chosen_LE, costs_DLE, limits):
                chosen_LE.flat[place] = False
    return chosen_LE


def _integer_program(values_LE: np.ndarray, costs_DLE: np.ndarray, limits_D: np.ndarray) -> np.ndarray:
    """Binary program by HiGHS, made exact: integer rows in lowest terms, tight gaps, and every answer re-checked."""
    layers, experts = values_LE.shape
    # HiGHS accepts violations of 1e-6 and no coefficient of 1e15: rows are put in lowest terms, and scaled to 32 bits
    # where that is not enough. Rounding costs and limit down loses no feasible set; the re-check below does the rest.
    divisor_D = np.gcd.reduce(costs_DLE.reshape(len(costs_DLE), -1), axis=1)
    divisor_D *= np.maximum(costs_DLE.max(axis=(1, 2)) // divisor_D >> 32, 1)
    rows = [
        LinearConstraint(cost.ravel() // divisor, ub=limit // divisor)
        for cost, divisor, limit in zip(costs_DLE, divisor_D, limits_D, strict=True)
    ]
    rows.append(LinearConstraint(np.kron(np.eye(layers), np.ones(experts)), lb=1))
    # Its absolute gap is fixed at 1e-6, so values are scaled until that is 1e-12 of the largest.
    scale = 1e6 / (float(np.abs(values_LE).max()) or 1.0)
    goal, exactly = -scale * values_LE.ravel(), {"mip_rel_gap": 0.0}
    while True:
        answer = milp(goal, integrality=1, bounds=Bounds(0, 1), constraints=rows, options=exactly)
        # A fault of the solver must not be a BudgetError: callers would take it for a size that does not fit.
        if answer.x is None and answer.status != INFEASIBLE:
            raise RuntimeError(f"the solver gave up ({answer.message}); please report it with the configuration")
        if answer.x is None:
            raise BudgetError("no set with one expert per MoE layer fits all limits together; raise one of them")
        chosen_LE = (answer.x > 0.5).reshape(layers, experts)
        if respects(chosen_LE, costs_DLE, limits_D):
            return chosen_LE
        # Accepted within tolerance but over a limit: forbid exactly this set and ask again.
        sign = np.where(chosen_LE.ravel(), 1.0, -1.0)
        rows.append(LinearConstraint(sign, ub=float(chosen_LE.sum()) - 1))


def respects(chosen_LE: np.ndarray, costs_DLE: np.ndarray, limits_D: np.ndarray) -> bool:
    """Exact integer check of all limits, and of one expert per layer."""
    used_D = (costs_DLE * chosen_LE).sum(axis=(1, 2))
    return bool((used_D <= limits_D).all() and chosen_LE.any(axis=1).all())


def _require_finite(scores_LE: np.ndarray) -> None:
    if not np.isfinite(scores_LE).all():
        layer, expert = np.argwhere(~np.isfinite(scores_LE))[0]
        raise ValueError(f"score of layer {layer}, expert {expert} is not finite; give every expert a number")
