"""How much of a system that keeps the whole model resident a client can bear: k, or the rank of its adapters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fedmoe_core.budget.limits import BudgetError
from fedmoe_core.messages.plan import ExpertPlan, Extras
from fedmoe_core.server.planning import plan_of_masks
from fedmoe_core.server.state import Population, ServerState

UNCOUNTED = (
    "a budget in experts cannot be kept, since every expert is resident; such a client gets its share of the ranks and "
    "the run is shown as not inside the budgets",
    "the trunk follows train.trunk, as in every other system",
)  # what the systems with ranks say of themselves

# Makes the plan of a size, bound by the population's budgets or (False) by no budget.
MakePlan = Callable[[Population, int, bool], ExpertPlan]


def largest_size(population: Population, client: int, largest: int) -> int:
    """Return the size that a client's expert budget stands for: its share of the model's experts times ``largest`` [E].

    Such systems hold every expert, so a count cannot bound what they hold; a client that is worth a quarter of the
    experts is taken to be worth a quarter of k, or of the ranks, and at least one.
    """
    allowed = population.budgets[client].experts
    if allowed is None:
        return largest
    whole = population.costs.base_experts or population.costs.total_experts
    return max(1, min(largest, largest * allowed // whole))


def largest_plan(population: Population, client: int, largest: int, make: MakePlan) -> ExpertPlan:
    """Return the plan of the largest size with which the client keeps all local steps inside its budget.

    At size 1 fewer steps and fewer trained layers will do. A client that cannot hold the whole model in its count of
    experts is bound by its other limits; one that cannot do it at all is bound by nothing, at size 1. Both are charged
    for what they need and shown as over their budget.

    Args:
        population: its budgets bind the plan.
        client: the client to plan for.
        largest: the size of a client without limits.
        make: the plan of a size; raises BudgetError where the budget cannot bear it.
    """
    top = largest_size(population, client, largest)
    uncounted = tuple(replace(budget, experts=None) for budget in population.budgets)
    for bound in (population, replace(population, budgets=uncounted)):
        for size in range(top, 0, -1):
            try:
                plan = make(bound, size, True)
            except BudgetError:
                continue
            whole = plan.local_steps == population.config.train.local_steps and bool(plan.trainable_LE.all())
            if size == 1 or whole:
                return plan
    return make(population, 1, False)


def resident_plan(
    population: Population,
    state: ServerState,
    client: int,
    largest: int,
    extras_of: Callable[[Population, int], Extras],
    *,
    by_k: bool = False,
) -> ExpertPlan:
    """Return the ``largest_plan`` of all experts; those that the client has from an earlier round do not travel again.

    Args:
        population, state, client, largest: as ``largest_plan``.
        extras_of: what the client is asked for at a size, under the population that binds the plan.
        by_k: the size is k, and not the rank of adapters.
    """
    every_LE = population.every_LE
    cached_LE = every_LE if state.visits[client] else ~every_LE

    def make(bound: Population, size: int, budgeted: bool) -> ExpertPlan:
        extras, top_k = replace(extras_of(bound, size), cached_LE=cached_LE), size if by_k else None
        return plan_of_masks(bound, state, client, every_LE, top_k=top_k, budgeted=budgeted, extras=extras)

    return largest_plan(population, client, largest, make)
