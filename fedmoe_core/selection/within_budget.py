"""Which experts a client gets, and how much work: exact solvers of HFedMoE eq. 15 and of its real-budget forms."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from fedmoe_core.budget.additive import AdditiveCosts
from fedmoe_core.budget.cost_model import CostModel, Mode
from fedmoe_core.budget.limits import Budget, BudgetError, show
from fedmoe_core.budget.rates import Prices
from fedmoe_core.budget.resources import RESOURCES
from fedmoe_core.selection.knapsack import knapsack, respects

NANO = 1e9  # the rows of energy and time count nanojoules and nanoseconds, for solvers add whole numbers up


class Allowance(NamedTuple):
    """What a budget's additive limits leave for experts: rows of (memory, down, up, experts, energy, time) that
    it limits.

    Attributes:
        costs_DLE: int64, what each expert that trains takes of it.
        base_D: int64, what is taken before any expert.
        limits_D: int64, the limits themselves.
        frozen_D: int64, what an expert takes that only runs.
    """

    costs_DLE: np.ndarray
    base_D: np.ndarray
    limits_D: np.ndarray
    frozen_D: np.ndarray

    @property
    def free_D(self) -> np.ndarray:
        """What is left for experts."""
        return self.limits_D - self.base_D


class FlopFit(NamedTuple):
    """What a FLOP budget leaves of the work."""

    local_steps: int
    top_k: int
    trainable_LE: np.ndarray


def choose(
    budget: Budget,
    model: CostModel,
    scores_LE: np.ndarray,
    *,
    client: int | str = 0,
    mode: Mode = "compact",
    first_participation: bool = True,
    local_steps: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """Choose a client's permitted and trainable experts (L, E): the best score inside memory, bytes and count.

    Compact: permitted = trainable. Backward-masked (the paper's form): all permitted, the chosen ones trainable; it
    holds every expert, so it takes a budget with an expert count, and any other limit has to hold the whole model.
    A budget that holds the whole model leaves nothing to choose: all experts are in, whatever their scores (eq. 15
    would drop negative ones; invariant 9 asks that a full budget be FedAvg for every lambda and beta).
    FLOPs do not depend on the experts held; ``fit_flops`` meets them. Of an energy budget, ``local_steps`` steps are
    set aside before traffic is paid from it, or the least step where these leave too little; of time the least step.

    Raises:
        ValueError: a limit is too small for one expert per MoE layer, with the number that would do; or the mode
            cannot honour this kind of budget.
    """
    allowance = allowance_of(
        budget, model, client=client, mode=mode, first_participation=first_participation, local_steps=local_steps
    )
    if respects(np.ones_like(scores_LE, dtype=bool), allowance.costs_DLE, allowance.free_D):
        return np.ones_like(scores_LE, dtype=bool), np.ones_like(scores_LE, dtype=bool)
    try:
        chosen_LE = knapsack(scores_LE, allowance.costs_DLE, list(allowance.free_D))
    except BudgetError as error:
        raise BudgetError(f"client {client}: {error}") from error
    permitted_LE = np.ones_like(chosen_LE) if mode == "backward-masked" else chosen_LE
    return permitted_LE, chosen_LE.copy()


def allowance_of(
    budget: Budget,
    model: CostModel,
    *,
    client: int | str = 0,
    mode: Mode = "compact",
    first_participation: bool = True,
    local_steps: int = 1,
) -> Allowance:
    """Return the rows in which ``budget`` limits the experts of a client.

    Raises:
        ValueError: as ``choose``.
    """
    rows = model.rows(mode, first_participation=first_participation)
    for resource in RESOURCES.values():
        amount, prices = budget.limit(resource.word), resource.prices(budget)
        if amount is not None and prices is not None:
            rows = _with_priced(rows, resource.word, prices, model, limit=amount, local_steps=local_steps)
    limited = {
        name: _whole(name, limit) for name in dict.fromkeys(rows.names) if (limit := budget.limit(name)) is not None
    }
    if mode == "backward-masked" and limited and "experts" not in limited:
        raise ValueError(
            f"client {client}: backward-masked selection keeps every expert resident, so a limit on "
            f"{'/'.join(limited)} cannot choose among them; add experts=N to the budget or use selection.mode=compact"
        )
    _require_feasible(limited, rows, client=client, mode=mode)
    kept = [row for row, name in enumerate(rows.names) if name in limited]
    limits_D = np.array([limited[rows.names[row]] for row in kept], dtype=np.int64)
    return Allowance(rows.costs_DLE[kept], rows.base_D[kept], limits_D, rows.frozen_D[kept])


def _with_priced(
    rows: AdditiveCosts, word: str, prices: Prices, model: CostModel, *, limit: float, local_steps: int
) -> AdditiveCosts:
    """Add the row of energy or time, in billionths: the work that is set aside, and the traffic of every expert."""
    every_LE = np.ones(rows.costs_DLE.shape[1:], dtype=bool)
    down, up = rows.names.index("down"), rows.names.index("up")
    flop, byte_down, byte_up = (NANO * price for price in prices)
    costs_LE = byte_down * rows.costs_DLE[down] + byte_up * rows.costs_DLE[up]
    sent = byte_down * int(rows.base_D[down]) + byte_up * int(rows.base_D[up])
    frozen = byte_down * int(rows.frozen_D[down]) + byte_up * int(rows.frozen_D[up])
    whole, least = local_steps * model.step_flops(every_LE, every_LE), model.step_flops(every_LE, every_LE, top_k=1)
    traffic = sent + float(costs_LE.min(axis=1).sum())
    # Of time the least step is set aside: a deadline shortens training and leaves a client its experts.
    work = whole if word != "time" and flop * whole + traffic <= NANO * limit else least
    return AdditiveCosts(
        (*rows.names, word),
        np.append(rows.base_D, math.ceil(sent + flop * work)),
        np.concatenate([rows.costs_DLE, np.ceil(costs_LE).astype(np.int64)[None]]),
        np.append(rows.frozen_D, math.ceil(frozen)),
    )


def _whole(word: str, limit: float) -> int:
    """A limit in the whole numbers of its row."""
    return int(limit) if RESOURCES[word].exact else math.floor(min(NANO * limit, 2.0**60))


def trade_for_frozen(
    allowance: Allowance, trained_LE: np.ndarray, scores_LE: np.ndarray, *, share: float, most: int
) -> tuple[np.ndarray, np.ndarray]:
    """Train fewer experts and hold more [E]: the permitted and the trainable ones (L, E) within the same room.

    Of ``trained_LE`` the best ``share`` goes on training, at least one in every layer. What the rest took is spent on
    experts that only run, best first, until ``most`` are held: under a memory limit one that trains (weights, gradient,
    two moments) makes room for four. Where that buys nothing, as under a limit on their number, or where ``most`` or
    more could train, the plan is as it was: an expert whose training still fits trains. All experts of a layer cost the
    same, so best first is the best for this number of trained ones.
    """
    layers, wanted = trained_LE.shape[0], math.ceil(share * int(trained_LE.sum()))
    if trained_LE.sum() >= most:
        return trained_LE, trained_LE.copy()
    worth_LE = np.where(trained_LE, scores_LE, -np.inf)
    learns_LE = np.zeros_like(trained_LE)
    learns_LE[np.arange(layers), worth_LE.argmax(axis=1)] = True
    order = np.argsort(-worth_LE, axis=None, kind="stable")[: int(trained_LE.sum())]
    rest = order[~learns_LE.ravel()[order]]
    learns_LE.ravel()[rest[: max(0, wanted - layers)]] = True
    free_D = allowance.free_D - (allowance.costs_DLE * learns_LE).sum(axis=(1, 2))
    held_LE = learns_LE.copy()
    best = np.argsort(-scores_LE, axis=None, kind="stable")
    for place in best[~held_LE.ravel()[best]]:
        if held_LE.sum() < most and (allowance.frozen_D <= free_D).all():
            held_LE.flat[place] = True
            free_D = free_D - allowance.frozen_D
    costs_DP = allowance.costs_DLE.reshape(len(free_D), -1)
    for place in best[(held_LE & ~learns_LE).ravel()[best]]:
        more_D = costs_DP[:, place] - allowance.frozen_D
        if (more_D <= free_D).all():
            learns_LE.flat[place] = True
            free_D = free_D - more_D
    return held_LE, learns_LE


def fit_flops(
    budget: Budget,
    model: CostModel,
    permitted_LE: np.ndarray,
    trainable_LE: np.ndarray,
    *,
    local_steps: int,
    top_k: int | None = None,
    scores_LE: np.ndarray | None = None,
    client: int | str = 0,
) -> FlopFit:
    """Fit the work to a FLOP budget: local steps first (down to one), then k', then the trainable share.

    k' starts at the most experts that any layer holds, if that is below the model's k: the rest would be empty places.
    At k' = 1 a token meets one expert, so what is trained within a layer no longer changes the bound. The share then
    falls by whole layers, down to one, least total score first (ties: the shallower layer, whose backward is longer).

    Raises:
        ValueError: not even one step with k' = 1 and one trainable layer fits, with the number that would do.
    """
    most_k = min(model.top_k if top_k is None else top_k, int(permitted_LE.sum(axis=1).max(initial=0)))
    if budget.flops is None:
        return FlopFit(local_steps, most_k, trainable_LE)
    counted = [row.word for row in RESOURCES.values() if row.counted_by and budget.limit(row.word) is not None]
    allowed = f"what the budget's {' or '.join([*counted, 'operations'])} allow," if counted else "flops budget"
    for k in range(most_k, 0, -1) if most_k else (0,):  # 0: a model without MoE layers
        steps = _steps(budget.flops, model.step_flops(permitted_LE, trainable_LE, top_k=k))
        if steps:
            return FlopFit(min(local_steps, steps), k, trainable_LE)
    worth_L = np.where(trainable_LE, 0.0 if scores_LE is None else scores_LE, 0.0).sum(axis=1)
    kept_LE = trainable_LE.copy()
    layers = np.flatnonzero(trainable_LE.any(axis=1))
    for layer in layers[np.argsort(worth_L[layers], kind="stable")][:-1]:
        kept_LE[layer] = False
        steps = _steps(budget.flops, model.step_flops(permitted_LE, kept_LE, top_k=1))
        if steps:
            return FlopFit(min(local_steps, steps), 1, kept_LE)
    needed = model.step_flops(permitted_LE, kept_LE, top_k=1)
    least = " with one expert per token and one trainable layer" if most_k else ""
    raise BudgetError(
        f"client {client}: {allowed} {show('flops', budget.flops)} cannot pay one local step{least}; "
        f"at least {show('flops', needed)} is needed"
    )


def explore(
    permitted_LE: np.ndarray, demand_LE: np.ndarray, scores_LE: np.ndarray, *, chance: float, rng: np.random.Generator
) -> np.ndarray:
    """Give absent experts a turn [E]: per layer, with ``chance``, the held expert of least score gives way to one.

    The newcomer is drawn in proportion to the client's own demand for it (sum of G_e, which the full router measures
    also for absent experts). All experts of a layer cost the same, so the budget is untouched. A layer without an
    absent expert in demand stays as it is. Two draws are taken per layer whatever happens, so layers do not shift
    each other's randomness.
    """
    explored_LE = permitted_LE.copy()
    for layer, (coin, place) in enumerate(rng.random((permitted_LE.shape[0], 2))):
        demand_E = np.where(permitted_LE[layer], 0.0, demand_LE[layer])
        if coin >= chance or not demand_E.sum() > 0:
            continue
        held = np.flatnonzero(permitted_LE[layer])
        cumulative_E = np.cumsum(demand_E)
        newcomer = int(np.searchsorted(cumulative_E, place * cumulative_E[-1], side="right"))
        newcomer = min(newcomer, int(np.flatnonzero(demand_E)[-1]))  # the product may round up to the total
        explored_LE[layer, held[np.argmin(scores_LE[layer, held])]] = False
        explored_LE[layer, newcomer] = True
    if (explored_LE.sum(axis=1) != permitted_LE.sum(axis=1)).any():
        raise AssertionError("exploration changed the number of experts of a layer")
    return explored_LE


def _require_feasible(limited: dict[str, int], rows: AdditiveCosts, *, client: int | str, mode: Mode) -> None:
    """Raise for every limit that cannot hold the least a client needs, naming the number that would do."""
    least_D = rows.base_D + rows.costs_DLE.min(axis=2).sum(axis=1)
    needed = {
        word: max(int(least) for name, least in zip(rows.names, least_D, strict=True) if name == word)
        for word in limited
    }
    short = [word for word, limit in limited.items() if needed[word] > limit]
    if not short:
        return
    have = " and ".join(f"{word} budget {_shown(word, limited[word])}" for word in short)
    need = " and ".join(
        f"{_shown(word, needed[word])} of {word}" if len(short) > 1 else _shown(word, needed[word]) for word in short
    )
    least = (
        "every expert, which backward-masked selection keeps resident"
        if mode != "compact"
        else "one expert per MoE layer"
    )
    raise BudgetError(f"client {client}: {have} cannot hold {least}; at least {need} is needed")


def _shown(word: str, amount: int) -> str:
    return show(word, amount if RESOURCES[word].exact else amount / NANO)


def _steps(budget: float, step: float) -> int:
    """Whole steps inside the budget; the product, as the cost model forms it, never passes it by rounding."""
    steps = int(budget // step)
    return steps if steps * step <= budget else steps - 1
