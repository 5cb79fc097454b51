"""FLEX-MoE's client-expert assignment (arXiv 2512.23070): fitness scores, load deficits and the balanced program.

We could not obtain the paper's formulas. It is known [N] that the server scores the fitness of client-expert pairs from
feedback, keeps historical deficits, and solves a program with lower and upper load bounds. The formulas here are our
explicit reading [E]. C is the number of clients of the round, E that of experts of one MoE layer. Every layer is
assigned alone, while fitness and deficits may have leading axes, such as layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import block_array, csr_array, eye_array, hstack, kron


@dataclass(frozen=True)
class Fitness:
    """What the server remembers of every client-expert pair.

    Attributes:
        mean_CE: moving average of quality; 0 where a pair was never tried.
        tried_CE: rounds in which the pair was assigned, N of the exploration bonus.
    """

    mean_CE: np.ndarray
    tried_CE: np.ndarray


@dataclass(frozen=True)
class Assignment:
    """Which client gets which expert: mask (C, E), load, objective and the proven distance to the optimum."""

    chosen_CE: np.ndarray
    load_E: np.ndarray
    value: float
    gap: float


def quality(accuracy_CE: np.ndarray, loss_CE: np.ndarray, usage_CE: np.ndarray) -> np.ndarray:
    """Compute q = accuracy + exp(-loss) + usage / sum_e usage, from a round's feedback [E].

    NaN, the loss or accuracy of an expert that served no token, counts as 0.
    """
    total_C1 = usage_CE.sum(axis=-1, keepdims=True)
    share_CE = usage_CE / np.where(total_C1 > 0, total_C1, 1.0)
    return np.nan_to_num(accuracy_CE) + np.nan_to_num(np.exp(-loss_CE)) + share_CE


def observe(fitness: Fitness, quality_CE: np.ndarray, assigned_CE: np.ndarray, *, rate: float) -> Fitness:
    """Return Q^t = (1 - g) Q^{t-1} + g q for assigned pairs, else Q^{t-1}; a pair's first q is taken whole [E]."""
    step_CE = np.where(fitness.tried_CE == 0, 1.0, rate)
    moved_CE = (1 - step_CE) * fitness.mean_CE + step_CE * quality_CE
    return Fitness(np.where(assigned_CE, moved_CE, fitness.mean_CE), fitness.tried_CE + assigned_CE)


def scores(fitness: Fitness, round: int, *, exploration: float) -> np.ndarray:
    """Return the z-score of Q + xi * sqrt(log t / (1 + N)) over each client's experts, with t = round + 1 [E].

    A pair never tried counts as the mean of those the client did try, so that ignorance is neither praise nor blame.
    The z-score keeps clients of large losses from dominating; a client whose scores are all equal gets zeros.
    """
    tried_CE = fitness.tried_CE > 0
    count_C1 = np.maximum(tried_CE.sum(axis=-1, keepdims=True), 1)
    neutral_C1 = (fitness.mean_CE * tried_CE).sum(axis=-1, keepdims=True) / count_C1
    mean_CE = np.where(tried_CE, fitness.mean_CE, neutral_C1)
    raw_CE = mean_CE + exploration * np.sqrt(math.log(round + 1) / (1 + fitness.tried_CE))
    centered_CE = raw_CE - raw_CE.mean(axis=-1, keepdims=True)
    spread_C1 = centered_CE.std(axis=-1, keepdims=True)
    # Scores equal up to rounding have a spread of 1e-17, which no client should be judged by.
    return np.where(spread_C1 > 1e-12, centered_CE / np.where(spread_C1 > 1e-12, spread_C1, 1.0), 0.0)


def next_deficit(deficit_E: np.ndarray, load_E: np.ndarray) -> np.ndarray:
    """Return d_e^t = max(0, d_e^{t-1} + lbar - load_e^{t-1}), lbar = mean load: what past rounds owe an expert [E]."""
    return np.maximum(0.0, deficit_E + load_E.mean(axis=-1, keepdims=True) - load_E)


def load_bounds(samples_C: np.ndarray, counts_C: np.ndarray, experts: int, delta: float) -> tuple[float, float]:
    """Return (1 - delta) lbar and (1 + delta) lbar, lbar = sum_c n_c k_c / E [E].

    Equal n_c: bounds are drawn in to whole clients, which loses no assignment and keeps the linear program integral;
    where no whole number lies between them, to the two nearest lbar.
    """
    mean = float(samples_C @ counts_C) / experts
    low, high = (1 - delta) * mean, (1 + delta) * mean
    if np.ptp(samples_C) > 0:
        return low, high
    unit = float(samples_C[0])
    least, most = math.ceil(low / unit - 1e-9), math.floor(high / unit + 1e-9)
    if least > most:
        least, most = math.floor(mean / unit), math.ceil(mean / unit)
    return least * unit, most * unit


@dataclass(frozen=True)
class Program:
    """The settings of the assignment.

    Attributes:
        deficit_weight: eta, what a deficit of one mean load is worth.
        delta: how far a load may be from the mean, as a share of it.
        slack_price: M, for one mean client of load outside the bounds; None = so much that bounds precede all scores.
        node_limit: branches of the integer program; a count, so that every machine gives the same answer.
    """

    deficit_weight: float = 1.0
    delta: float = 0.1
    slack_price: float | None = None
    node_limit: int = 200


def assign(
    scores_CE: np.ndarray,
    counts_C: np.ndarray,
    samples_C: np.ndarray,
    *,
    deficit_E: np.ndarray | None = None,
    program: Program | None = None,
) -> Assignment:
    """Solve FLEX-MoE's program [E]: the best total fitness with the loads of all experts near their mean.

    max sum (Q_ce + eta d_e / lbar) x_ce - M sum_e (s_e^- + s_e^+), where sum_e x_ce = k_c and
    (1 - delta) lbar - s_e^- <= sum_c n_c x_ce <= (1 + delta) lbar + s_e^+.
    As few experts as possible stay without a client (none if there are enough places).

    With equal n_c the matrix is that of a transportation problem, totally unimodular: a vertex of the
    linear program is integral, and HiGHS is done at its root. Otherwise it branches, up to ``node_limit``, and reports
    the gap.

    Args:
        scores_CE: Q, finite.
        counts_C: k_c in 1..E.
        samples_C: n_c > 0.
        deficit_E: d; None = 0.
        program: eta, delta, M.

    Raises:
        ValueError: k_c outside 1..E, or a score that is not finite.
    """
    program = program or Program()
    _check(scores_CE, counts_C)
    clients, experts = scores_CE.shape
    mean_client = float(samples_C.mean())
    owed_E = np.zeros(experts) if deficit_E is None else deficit_E * experts / float(samples_C @ counts_C)
    value_CE = scores_CE + program.deficit_weight * owed_E
    # Less slack may cost every client one exchange of experts, an empty expert less may cost all slack there is.
    bounds_first = 1.0 + float(np.ptp(value_CE)) * clients
    price = bounds_first if program.slack_price is None else program.slack_price
    empty_price = bounds_first + 2 * price * float(samples_C @ counts_C) / mean_client
    low, high = (bound / mean_client for bound in load_bounds(samples_C, counts_C, experts, program.delta))

    def worth(chosen_CE: np.ndarray) -> float:
        load_E = samples_C @ chosen_CE / mean_client
        slack = float(np.maximum(low - load_E, 0).sum() + np.maximum(load_E - high, 0).sum())
        empty = float((~chosen_CE.any(axis=0)).sum())
        return float(value_CE[chosen_CE].sum()) - price * slack - empty_price * empty

    cost_V = np.concatenate([-value_CE.ravel(), np.full(2 * experts, price), np.full(experts, empty_price)])
    answer = milp(
        cost_V,
        integrality=np.repeat([1, 0], [clients * experts, 3 * experts]),
        bounds=Bounds(0, np.repeat([1.0, np.inf], [clients * experts, 3 * experts])),
        constraints=_rows(experts, counts_C, samples_C / mean_client, (low, high)),
        options={"node_limit": program.node_limit, "mip_rel_gap": 0.0},
    )
    if answer.x is None:
        raise ValueError(f"no assignment was found within {program.node_limit} branches; raise node_limit")
    chosen_CE = answer.x[: clients * experts].reshape(clients, experts) > 0.5
    value = worth(chosen_CE)
    return Assignment(chosen_CE, samples_C @ chosen_CE, value, max(0.0, -float(answer.mip_dual_bound) - value))


def assign_layers(
    scores_LCE: np.ndarray,
    counts_LC: np.ndarray,
    samples_C: np.ndarray,
    *,
    deficit_LE: np.ndarray | None = None,
    program: Program | None = None,
) -> list[Assignment]:
    """Solve one program for each MoE layer: their loads do not share a bound, and k_c of each layer is given."""
    deficits = [None] * len(scores_LCE) if deficit_LE is None else list(deficit_LE)
    return [
        assign(scores_CE, counts_C, samples_C, deficit_E=deficit_E, program=program)
        for scores_CE, counts_C, deficit_E in zip(scores_LCE, counts_LC, deficits, strict=True)
    ]


def _rows(
    experts: int, counts_C: np.ndarray, load_C: np.ndarray, bounds: tuple[float, float]
) -> list[LinearConstraint]:
    """The program's constraints over x (C*E), s^- (E), s^+ (E) and whether an expert is empty (E)."""
    clients, each, nothing = len(counts_C), eye_array(experts), csr_array((len(counts_C), 3 * experts))
    load = kron(csr_array(load_C[None, :]), each)
    count = kron(csr_array(np.ones((1, clients))), each)
    sides = block_array([[load, each, None, None], [load, None, -each, None], [count, None, None, each]])
    least, most = np.repeat([bounds[0], -np.inf, 1.0], experts), np.repeat([np.inf, bounds[1], np.inf], experts)
    places = hstack([kron(eye_array(clients), np.ones((1, experts))), nothing])
    return [LinearConstraint(sides.tocsr(), least, most), LinearConstraint(places.tocsr(), counts_C, counts_C)]


def _check(scores_CE: np.ndarray, counts_C: np.ndarray) -> None:
    experts = scores_CE.shape[1]
    if not np.isfinite(scores_CE).all():
        client, expert = np.argwhere(~np.isfinite(scores_CE))[0]
        raise ValueError(f"score of client {client}, expert {expert} is not finite; give every pair a number")
    for client, count in enumerate(counts_C):
        if not 1 <= count <= experts:
            raise ValueError(f"client {client}: {count} experts of a layer is outside 1..{experts}; change its budget")
