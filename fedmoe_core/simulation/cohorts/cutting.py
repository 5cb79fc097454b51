"""Groups of a round: plans of one kind cut into as few cohorts of even size as memory holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch

from fedmoe_core.base import show
from fedmoe_core.budget.limits import Budget
from fedmoe_core.config.run_config import Config
from fedmoe_core.messages.plan import ExpertPlan

CPU_MEMORY = 2 * 2**30  # a whole number that is the same on every machine, so that its cohorts and bits are, too
GPU_SHARE = 0.8  # of a GPU's memory; the rest is for the server's sums and the allocator's gaps


@dataclass(frozen=True)
class Group:
    """Clients that train at once.

    Attributes:
        plans: theirs, by ascending client.
        alone: why a client trains on its own though cohorts are asked for; else empty.
        predicted_bytes: the peak of the process while they train.
    """

    plans: tuple[ExpertPlan, ...]
    alone: str = ""
    predicted_bytes: int = 0

    @property
    def flops(self) -> float:
        """The most operations that they need."""
        return sum(plan.predicted.flops for plan in self.plans)


def memory_limit(config: Config, device: torch.device) -> int:
    """Return the most bytes of a cohort; it depends on nothing but the configuration and the kind of device."""
    if config.cohort.memory != "auto":
        return int(Budget.parse(f"memory={config.cohort.memory}").memory_bytes or 0)
    if device.type != "cuda":
        return CPU_MEMORY
    return int(torch.cuda.get_device_properties(device).total_memory * GPU_SHARE)


class CohortCosts(Protocol):
    """What cohorts of a run need."""

    def memory(self, plans: Sequence[ExpertPlan]) -> int:
        """Predict the peak bytes of these clients at once; at least what is measured."""
        ...

    def bound(self, plans: Sequence[ExpertPlan]) -> int:
        """Bound the same without measuring anything of that size."""
        ...


def in_cohorts(
    plans: Sequence[ExpertPlan],
    costs: CohortCosts,
    kind: Callable[[ExpertPlan], object],
    alone: Callable[[ExpertPlan], str],
    *,
    limits: tuple[Config, torch.device],
) -> list[Group]:
    """Put plans into groups: cohorts where that is possible, else single clients with the reason.

    It depends on the plans and the configuration alone, so every rank finds the same, and a resumed run, too.

    Args:
        plans: of a round.
        costs: what they need at once.
        kind: what clients of one cohort agree in.
        alone: what a plan asks of its client that no cohort can do; else empty.
        limits: the configuration, and where cohorts run.

    Raises:
        ValueError: ``cohort.memory`` cannot hold one of the clients by itself.
    """
    config, limit = limits[0], memory_limit(*limits)
    for plan in plans:
        if plan.predicted.memory_bytes > limit:
            raise ValueError(
                f"cohort.memory={config.cohort.memory} is {show.size(limit)}, and client {plan.client} alone "
                f"needs {show.size(plan.predicted.memory_bytes)}; raise it, or set cohort.clients=1"
            )
    groups, apart = [], [(plan, alone(plan)) for plan in plans]
    groups += [Group((plan,), why, plan.predicted.memory_bytes) for plan, why in apart if why]
    for alike in _kinds([plan for plan, why in apart if not why], kind):
        parts = _cut(alike, config.cohort.clients, costs, limit)
        why = _left_over(len(alike), len(parts), config.cohort.clients)
        for members in parts:
            if len(members) > 1:
                groups.append(Group(tuple(members), "", costs.memory(members)))
            else:
                groups.append(Group(tuple(members), why, members[0].predicted.memory_bytes))
    return sorted(groups, key=lambda group: group.plans[0].client)


def side_by_side(
    plans: Sequence[ExpertPlan],
    costs: CohortCosts,
    kind: Callable[[ExpertPlan], object],
    *,
    limits: tuple[Config, torch.device],
) -> list[list[ExpertPlan]]:
    """Cut plans into cohorts that do less than train, so what bounds training bounds them; by ascending client.

    Args:
        plans, costs, kind, limits: as ``in_cohorts``.
    """
    limit, most = memory_limit(*limits), limits[0].cohort.clients
    parts = [part for alike in _kinds(plans, kind) for part in _cut(alike, most, costs, limit)]
    return sorted(parts, key=lambda part: part[0].client)


def each_alone(plans: Sequence[ExpertPlan], why: str = "") -> list[Group]:
    """Put every plan into a group of its own, for one reason."""
    return [Group((plan,), why, plan.predicted.memory_bytes) for plan in plans]


def _left_over(clients: int, parts: int, most: int) -> str:
    """Why a client is by itself in one of so many parts of so many clients of its kind."""
    if clients == 1:
        return "no other client of its kind in the round"
    by_number = -(-clients // (most or clients))
    return "memory holds no second client" if parts > by_number else "the cohorts of its kind are full"


def _kinds(plans: Sequence[ExpertPlan], kind: Callable[[ExpertPlan], object]) -> list[list[ExpertPlan]]:
    """Sort plans by kind."""
    kinds: dict[object, list[ExpertPlan]] = {}
    for plan in plans:
        kinds.setdefault(kind(plan), []).append(plan)
    return list(kinds.values())


def _cut(alike: list[ExpertPlan], most: int, costs: CohortCosts, limit: int) -> list[list[ExpertPlan]]:
    """Cut plans of one kind into as few cohorts of even size as memory and ``most`` allow; 0 = any number."""
    most = min(most or len(alike), len(alike))
    for count in range(-(-len(alike) // most), len(alike) + 1):
        bounds = [len(alike) * place // count for place in range(count + 1)]
        parts = [alike[begin:end] for begin, end in pairwise(bounds)]
        if all(len(part) == 1 or costs.bound(part) <= limit for part in parts):
            return parts
    return [[plan] for plan in alike]
