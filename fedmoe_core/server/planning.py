"""Plans inside a budget: from scores or from masks to experts, steps and a predicted cost."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fedmoe_core.base.rng import counter_rng, counter_seed
from fedmoe_core.budget.cost_model import CostModel, Mode
from fedmoe_core.budget.limits import NOTHING, Budget, BudgetError, Cost
from fedmoe_core.messages.plan import NO_EXTRAS, ExpertPlan, Extras
from fedmoe_core.selection.within_budget import Allowance, allowance_of, choose, explore, fit_flops, trade_for_frozen
from fedmoe_core.server.state import Population, ServerState


def make_plan(
    population: Population,
    state: ServerState,
    client: int,
    scores_LE: np.ndarray,
    *,
    explore_absent: bool = True,
    train_share: float = 1.0,
    hold_share: float = 1.0,
    extras: Extras = NO_EXTRAS,
) -> ExpertPlan:
    """Plan the experts of largest score within the client's budget, then as much work as its FLOPs allow.

    Memory, traffic and count choose the experts (HFedMoE eq. 15 and its real-budget form); FLOPs then set local steps,
    k' and the trainable share. With ``explore_absent`` an absent expert sometimes replaces the least valued held one,
    in proportion to the client's own demand for it, so that no expert stays unseen forever [E]. ``train_share`` below 1
    applies to a compact client that could train less than ``hold_share`` of all experts. It trains only the best of
    those, at least that share of them, and holds more, at most ``hold_share`` of all [E].

    Raises:
        ValueError: the budget cannot hold one expert per MoE layer or pay one step; the message says what would do.
    """
    config, mode = population.config, population.config.selection.mode
    left, costs = _left(population, client, extras), asked_costs(population, extras)
    first = state.visits[client] == 0
    steps = config.train.local_steps
    permitted_LE, trainable_LE = choose(
        left, costs, scores_LE, client=client, mode=mode, first_participation=first, local_steps=steps
    )
    if train_share < 1 and mode == "compact" and not permitted_LE.all():
        allowance = allowance_of(left, costs, client=client, first_participation=first, local_steps=steps)
        most = int(hold_share * scores_LE.size)
        permitted_LE, trainable_LE = trade_for_frozen(allowance, trainable_LE, scores_LE, share=train_share, most=most)
    if explore_absent and mode == "compact" and config.selection.explore > 0:
        demand_LE = (state.profiles[client] or population.prior).prob_sum_LE
        rng = counter_rng(config.seed, "explore", state.round, client)
        explored_LE = explore(permitted_LE, demand_LE, scores_LE, chance=config.selection.explore, rng=rng)
        # A newcomer takes over what the one that left did: it learns, or only runs and is measured.
        left_L1 = (trainable_LE & ~explored_LE).any(axis=1, keepdims=True)
        trainable_LE = trainable_LE & explored_LE | explored_LE & ~permitted_LE & left_L1
        permitted_LE = explored_LE
    return plan_of_masks(
        population, state, client, permitted_LE, trainable_LE, scores_LE=scores_LE, mode=mode, extras=extras
    )


def plan_of_masks(
    population: Population,
    state: ServerState,
    client: int,
    permitted_LE: np.ndarray,
    trainable_LE: np.ndarray | None = None,
    *,
    scores_LE: np.ndarray | None = None,
    top_k: int | None = None,
    local_steps: int | None = None,
    mode: Mode = "compact",
    budgeted: bool = True,
    extras: Extras = NO_EXTRAS,
) -> ExpertPlan:
    """Plan the experts that the algorithm chose itself, with as much work as the client's FLOPs allow.

    Args:
        population, state, client: the client to plan for, and what the server knows.
        permitted_LE, trainable_LE: the masks; None trains all permitted experts.
        scores_LE: which layers keep training where a FLOP budget cannot pay all of them; None = the deeper ones.
        top_k, local_steps: the most of each; None = the model's and the configuration's own.
        mode: what an expert budget counts.
        budgeted: False binds the plan by nothing: it is charged for what it needs, and the run marked if that is more
            than the client's budget.
        extras: what else the client is asked for.

    Raises:
        ValueError: the plan passes the client's budget in some resource, by name, need and limit; or a bad mask.
    """
    config, costs = population.config, asked_costs(population, extras)
    budget = population.budgets[client] if budgeted else Budget(name="unlimited")
    served_LE = extras.served(permitted_LE)
    trainable_LE = permitted_LE if trainable_LE is None else trainable_LE
    first = state.visits[client] == 0
    traffic = Cost(
        bytes_down=costs.bytes_down(permitted_LE, first_participation=first, cached_LE=extras.cached_LE),
        bytes_up=costs.bytes_up(trainable_LE),
    )
    left = _left(population, client, extras, served_LE=served_LE) if budgeted else budget
    fit = fit_flops(
        left.with_flops_of(traffic),
        costs,
        served_LE,
        extras.taught(trainable_LE),
        local_steps=config.train.local_steps if local_steps is None else local_steps,
        top_k=top_k,
        scores_LE=scores_LE,
        client=client,
    )
    trained_LE = trainable_LE & fit.trainable_LE
    predicted = costs.predict(
        permitted_LE,
        trained_LE,
        local_steps=fit.local_steps,
        top_k=fit.top_k,
        first_participation=first,
        cached_LE=extras.cached_LE,
        mode=mode,
    )
    flops = fit.local_steps * costs.step_flops(served_LE, extras.taught(trained_LE), top_k=fit.top_k)
    surcharge = whole_surcharge(population, client, extras, served_LE=served_LE, top_k=fit.top_k)
    return ExpertPlan(
        client=client,
        round=state.round,
        permitted_LE=permitted_LE,
        trainable_LE=trained_LE,
        top_k=fit.top_k,
        local_steps=fit.local_steps,
        seed=counter_seed(config.seed, "client", state.round, client),
        budget=budget,
        predicted=replace(predicted, flops=flops).with_extra(surcharge),
        first_participation=first,
        mode=mode,
        extras=replace(extras, surcharge=surcharge),
    )


def plan_everything(population: Population, state: ServerState, client: int) -> ExpertPlan:
    """Plan all experts, all steps, without limit: what FedAvg asks of every client, and is charged for."""
    return plan_of_masks(population, state, client, population.every_LE, budgeted=False)


def client_allowance(
    population: Population, client: int, *, first_participation: bool, extras: Extras = NO_EXTRAS
) -> Allowance:
    """Return what the client's budget leaves for experts once the work besides training is paid.

    Raises:
        ValueError: the budget cannot hold one expert per MoE layer; the message says what would do.
    """
    left, costs = _left(population, client, extras), asked_costs(population, extras)
    steps = population.config.train.local_steps
    return allowance_of(left, costs, client=client, first_participation=first_participation, local_steps=steps)


def bears(
    population: Population,
    state: ServerState,
    client: int,
    masks: tuple[np.ndarray, np.ndarray],
    *,
    surcharge: Cost = NOTHING,
) -> bool:
    """Tell if the client's budget bears these held and trained experts, all others served, for a step at k' = 1."""
    costs, (held_LE, trained_LE) = population.costs, masks
    cost = costs.predict(held_LE, trained_LE, local_steps=1, first_participation=state.visits[client] == 0)
    step = costs.step_flops(np.ones_like(held_LE), trained_LE, top_k=1)
    return population.budgets[client].fits(replace(cost, flops=step).with_extra(surcharge))


def asked_costs(population: Population, extras: Extras) -> CostModel:
    """Return the cost model of a client that is asked for these things."""
    return extras.costs(
        population.costs_at(extras.lora_rank),
        in_state=population.costs.lora_rank is not None,
        local_steps=population.config.train.local_steps,
    )


def whole_surcharge(
    population: Population, client: int, extras: Extras, *, served_LE: np.ndarray, top_k: int | None = None
) -> Cost:
    """Return what a client spends besides training: the surcharge that was asked for, and validation."""
    surcharge = extras.surcharge
    if not extras.validate:
        return surcharge
    if population.validation_tokens_C is None:
        raise ValueError("a plan asks for validation; declare needs_validation = True in its algorithm")
    costs, tokens = asked_costs(population, extras), int(population.validation_tokens_C[client])
    spent = costs.forward_flops(served_LE, tokens=tokens, top_k=top_k)
    return surcharge.with_extra(Cost(flops=spent, bytes_up=costs.profile_bytes + EVALUATION_BYTES))


EVALUATION_BYTES = 3 * 8  # loss sum, count and correct predictions


def _left(population: Population, client: int, extras: Extras, *, served_LE: np.ndarray | None = None) -> Budget:
    """The client's budget once the work besides training is paid; by default at the most that this may be."""
    served_LE = population.every_LE if served_LE is None else served_LE
    try:
        return population.budgets[client].after(whole_surcharge(population, client, extras, served_LE=served_LE))
    except BudgetError as error:
        raise BudgetError(f"client {client}: {error}") from error
