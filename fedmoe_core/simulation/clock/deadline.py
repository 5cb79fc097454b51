"""The deadline of rounds before the first: it limits plans, and who cannot meet it is set aside."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from fedmoe_core.algorithms.base import Algorithm
from fedmoe_core.budget.limits import Budget, BudgetError, show
from fedmoe_core.budget.resources import RESOURCES
from fedmoe_core.messages.plan import ExpertPlan
from fedmoe_core.server.state import Population

FAR = 1e9  # seconds that every plan keeps
SEARCHES = 20  # halvings of the range in which the smallest deadline lies: to a millionth of it


def keep_deadline(population: Population, form: type[Algorithm], params: dict[str, Tensor]) -> Population:
    """Return the population under ``time.deadline``: budgets that keep it, and the clients that no plan brings inside.

    With ``time.late=shorten`` the deadline is a limit of every budget. A client whose budget cannot pay one step in
    that time is ``absent``: it is never drawn, and its budget stays without that limit. Clients of one budget and one
    amount of validation data stand for each other.

    Raises:
        ValueError: no client could ever meet the deadline, with the least that would do; or too few for
            ``min_clients``.
    """
    config, deadline = population.config, population.config.time.deadline
    if not deadline:
        return population
    members = _alike(population)
    if config.time.late == "drop":
        if all(_least(population, form, params, alike[0]) > deadline for alike in members):
            raise _nobody(population, form, params)
        return population
    present = [alike for alike in members if _plan(population, form, params, alike[0], deadline)]
    absent = set(range(len(population.budgets))) - {client for alike in present for client in alike}
    if all(_least(population, form, params, alike[0], deadline) > deadline for alike in present):
        raise _nobody(population, form, params)
    left = len(population.budgets) - len(absent)
    if left < config.min_clients:
        raise ValueError(
            f"time.deadline={deadline:g} is met by {left} of {len(population.budgets)} clients, fewer than "
            f"min_clients={config.min_clients}; raise the deadline, or lower min_clients"
        )
    budgets = [b if c in absent else _limited(b, deadline) for c, b in enumerate(population.budgets)]
    return replace(population, budgets=tuple(budgets), absent=frozenset(absent))


def _limited(budget: Budget, deadline: float) -> Budget:
    """A budget that keeps the deadline too."""
    limit = budget.virtual_seconds
    return replace(budget, virtual_seconds=deadline if limit is None else min(limit, deadline))


def _alike(population: Population) -> list[list[int]]:
    """Clients that need equally long for equal plans."""
    tokens_C = population.validation_tokens_C
    members: dict[tuple[Budget, int], list[int]] = {}
    for client, budget in enumerate(population.budgets):
        members.setdefault((budget, 0 if tokens_C is None else int(tokens_C[client])), []).append(client)
    return list(members.values())


def _plan(
    population: Population,
    form: type[Algorithm],
    params: dict[str, Tensor],
    client: int,
    deadline: float | None,
    *,
    visited: bool = False,
) -> ExpertPlan | None:
    """A client's plan before the first round, where it alone has the deadline; None where no plan keeps it."""
    budgets = list(population.budgets)
    if deadline is not None:
        budgets[client] = _limited(budgets[client], deadline)
    algorithm = form(replace(population, budgets=tuple(budgets)))
    state = algorithm.init(params)
    if visited:
        state = replace(state, visits=(1,) * len(state.visits))
    if deadline is None:
        return algorithm.plan(state, [client])[0]
    try:
        return algorithm.plan(state, [client])[0]
    except BudgetError:
        _plan(population, form, params, client, None)  # raises where it is not the deadline that is too short
        return None


def _least(
    population: Population, form: type[Algorithm], params: dict[str, Tensor], client: int, deadline: float | None = None
) -> float:
    """The virtual seconds of a client that has the trunk already: the least that a plan under no deadline takes."""
    plan = _plan(population, form, params, client, deadline, visited=True)
    assert plan is not None
    return RESOURCES["time"].used(plan.predicted, population.budgets[client])


def _nobody(population: Population, form: type[Algorithm], params: dict[str, Tensor]) -> ValueError:
    """What to say where no client could meet the deadline: the smallest that one does meet."""
    found = [(_smallest(population, form, params, alike[0]), alike[0]) for alike in _alike(population)]
    seconds, client = min(found)
    deadline, tier = population.config.time.deadline, population.budgets[client].name
    return ValueError(
        f"time.deadline={deadline:g} is met by no client; the first that could is client {client} ({tier}), "
        f"in {show('time', seconds)}; set time.deadline={show('time', seconds).removesuffix(' s')} or more"
    )


def _smallest(population: Population, form: type[Algorithm], params: dict[str, Tensor], client: int) -> float:
    """The smallest deadline that a client meets."""
    most = _least(population, form, params, client)
    if population.config.time.late == "drop":
        return most
    plan = _plan(population, form, params, client, FAR)
    if plan is not None and plan.budget.virtual_seconds is None:  # an algorithm that no budget binds
        return most
    first = _plan(population, form, params, client, None)
    assert first is not None
    low, high = 0.0, RESOURCES["time"].used(first.predicted, population.budgets[client]) * 1.001
    for _ in range(SEARCHES):
        middle = (low + high) / 2
        low, high = (low, middle) if _plan(population, form, params, client, middle) else (middle, high)
    return high
