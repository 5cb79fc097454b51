"""The deadline of rounds before the first: it limits plans, and who cannot meet it is set aside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

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
    trial = Trial(population, form, params)
    members = _alike(population)
    # Where no plan knows the deadline, who has the trunk already may still meet it in a later round.
    kept = [alike for alike in members if trial.keeps(alike[0], deadline)]
    loose = [alike for alike in members if not trial.bound(alike[0])]
    if not kept and all(trial.least(alike[0]) > deadline for alike in loose):
        raise trial.nobody([alike[0] for alike in members])
    if config.time.late == "drop":
        return population
    absent = {client for alike in members if alike not in kept and alike not in loose for client in alike}
    left = len(population.budgets) - len(absent)
    if left < config.min_clients:
        raise ValueError(
            f"time.deadline={deadline:g} is met by {left} of {len(population.budgets)} clients, fewer than "
            f"min_clients={config.min_clients}; raise the deadline, or lower min_clients"
        )
    budgets = [b if c in absent else limited(b, deadline) for c, b in enumerate(population.budgets)]
    return replace(population, budgets=tuple(budgets), absent=frozenset(absent))


def limited(budget: Budget, deadline: float) -> Budget:
    """Return the budget that keeps the deadline too."""
    limit = budget.virtual_seconds
    return replace(budget, virtual_seconds=deadline if limit is None else min(limit, deadline))


def _alike(population: Population) -> list[list[int]]:
    """Clients that need equally long for equal plans."""
    tokens_C = population.validation_tokens_C
    members: dict[tuple[Budget, int], list[int]] = {}
    for client, budget in enumerate(population.budgets):
        members.setdefault((budget, 0 if tokens_C is None else int(tokens_C[client])), []).append(client)
    return list(members.values())


@dataclass(frozen=True)
class Trial:
    """Plans of single clients before the first round, under deadlines that they alone have.

    Attributes:
        population: without the deadline.
        form, params: the algorithm, and the model that it begins with.
    """

    population: Population
    form: type[Algorithm]
    params: dict[str, Tensor]

    def keeps(self, client: int, deadline: float) -> bool:
        """Tell whether the client's first plan keeps the deadline, which it knows if ``time.late`` says so."""
        plan = self._plan(client, deadline if self._shortens else None)
        return plan is not None and self._seconds(client, plan) <= deadline

    def bound(self, client: int) -> bool:
        """Tell whether a deadline can shorten the client's plan: FedAvg's plans know no budget."""
        if not self._shortens:
            return False
        plan = self._plan(client, FAR)
        return plan is not None and plan.budget.virtual_seconds is not None

    def least(self, client: int) -> float:
        """Return the virtual seconds of a client that has the trunk already, under no deadline."""
        plan = self._plan(client, None, visited=True)
        assert plan is not None
        return self._seconds(client, plan)

    def nobody(self, clients: Sequence[int]) -> ValueError:
        """Return what to say where no client meets the deadline: the smallest that one of these does meet."""
        seconds, client = min((self._smallest(client), client) for client in clients)
        deadline, tier = self.population.config.time.deadline, self.population.budgets[client].name
        return ValueError(
            f"time.deadline={deadline:g} is met by no client; the first that could is client {client} ({tier}), "
            f"in {show('time', seconds)}; set time.deadline={show('time', seconds).removesuffix(' s')} or more"
        )

    def _smallest(self, client: int) -> float:
        """The smallest deadline that a client meets."""
        if not self.bound(client):
            return self.least(client)
        whole = self._plan(client, None)
        assert whole is not None
        low, high = 0.0, self._seconds(client, whole) * 1.001
        for _ in range(SEARCHES):
            middle = (low + high) / 2
            low, high = (low, middle) if self.keeps(client, middle) else (middle, high)
        return high

    @property
    def _shortens(self) -> bool:
        return self.population.config.time.late == "shorten"

    def _seconds(self, client: int, plan: ExpertPlan) -> float:
        return RESOURCES["time"].used(plan.predicted, self.population.budgets[client])

    def _plan(self, client: int, deadline: float | None, *, visited: bool = False) -> ExpertPlan | None:
        """A client's plan; None where none keeps the deadline. What fails without a deadline raises."""
        budgets = list(self.population.budgets)
        if deadline is not None:
            budgets[client] = limited(budgets[client], deadline)
        try:
            algorithm = self.form(replace(self.population, budgets=tuple(budgets)))
            state = algorithm.init(self.params)
            if visited:
                state = replace(state, visits=(1,) * len(state.visits))
            return algorithm.plan(state, [client])[0]
        except BudgetError:
            if deadline is None:
                raise
            self._plan(client, None, visited=visited)
            return None
