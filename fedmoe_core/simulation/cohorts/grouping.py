"""Who trains with whom: the plans of a round in cohorts of one kind that memory holds, the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from fedmoe_core.base import show
from fedmoe_core.base.tensor_key import TensorKey
from fedmoe_core.budget.cohort_memory import Share
from fedmoe_core.budget.limits import Budget
from fedmoe_core.config.run_config import Config
from fedmoe_core.messages.plan import ExpertPlan
from fedmoe_core.server.planning import asked_costs
from fedmoe_core.simulation.cohorts.dry_step import CohortMeter
from fedmoe_core.simulation.world import World, local_settings

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


def grouped(world: World, plans: Sequence[ExpertPlan]) -> list[Group]:
    """Put the plans of a round into groups: cohorts where that is possible, else single clients with the reason.

    It depends on the plans and the configuration alone, so every rank finds the same, and a resumed run, too.

    Raises:
        ValueError: ``cohort.memory`` cannot hold one of the clients by itself.
    """
    meter = world.cohorts
    if meter is None:
        why = "" if world.config.cohort.clients == 1 else _never(world)
        return [Group((plan,), why, plan.predicted.memory_bytes) for plan in plans]
    limit = memory_limit(world.config, world.ranks.device)
    for plan in plans:
        if plan.predicted.memory_bytes > limit:
            raise ValueError(
                f"cohort.memory={world.config.cohort.memory} is {show.size(limit)}, and client {plan.client} alone "
                f"needs {show.size(plan.predicted.memory_bytes)}; raise it, or set cohort.clients=1"
            )
    groups, kinds = [], dict[tuple[object, ...], list[ExpertPlan]]()
    for plan in plans:
        if why := _asks_more(plan):
            groups.append(Group((plan,), why, plan.predicted.memory_bytes))
        else:
            kinds.setdefault(_kind(plan), []).append(plan)
    for alike in kinds.values():
        parts = _cut(world, meter, alike, limit)
        why = _left_over(len(alike), len(parts), world.config.cohort.clients)
        for members in parts:
            if len(members) > 1:
                predicted = meter.memory([_share(world, plan) for plan in members])
                groups.append(Group(tuple(members), "", predicted))
            else:
                groups.append(Group(tuple(members), why, members[0].predicted.memory_bytes))
    return sorted(groups, key=lambda group: group.plans[0].client)


def _left_over(clients: int, parts: int, most: int) -> str:
    """Why a client is by itself in one of so many parts of so many clients of its kind."""
    if clients == 1:
        return "no other client of its kind in the round"
    by_number = -(-clients // (most or clients))
    return "memory holds no second client" if parts > by_number else "the cohorts of its kind are full"


def _never(world: World) -> str:
    """Why this run has no cohorts though its configuration asks for them."""
    if local_settings(world.config, type(world.algorithm)).trunk == "fedavg":
        return "its trunk trains"
    return "the model's adapter has no cohorts"


def _asks_more(plan: ExpertPlan) -> str:
    """What a plan asks of its client that no cohort can do."""
    extras = plan.extras
    wishes = {
        "it chooses experts for every batch": extras.per_batch is not None,
        "its routers have an auxiliary loss": extras.aux is not None,
        "it is measured after training": extras.after is not None,
        "its sub-model is validated": extras.validate,
    }
    return next((reason for reason, asked in wishes.items() if asked), "")


def _kind(plan: ExpertPlan) -> tuple[object, ...]:
    """What clients of one cohort agree in."""
    extras = plan.extras
    return plan.top_k, plan.local_steps, extras.lora_rank, extras.train_router, extras.out_scale_L is None


def _cut(world: World, meter: CohortMeter, alike: list[ExpertPlan], limit: int) -> list[list[ExpertPlan]]:
    """Cut plans of one kind into as few cohorts of even size as memory and ``cohort.clients`` allow."""
    most = min(world.config.cohort.clients or len(alike), len(alike))
    shares = {plan.client: _share(world, plan) for plan in alike}
    for count in range(-(-len(alike) // most), len(alike) + 1):
        bounds = [len(alike) * place // count for place in range(count + 1)]
        parts = [alike[begin:end] for begin, end in pairwise(bounds)]
        members = ([shares[plan.client] for plan in part] for part in parts)
        if all(len(part) == 1 or meter.bound(part) <= limit for part in members):
            return parts
    return [[plan] for plan in alike]


def _share(world: World, plan: ExpertPlan) -> Share:
    own = any(TensorKey.parse(key).name not in ("router", "router_bias") for key in plan.extras.rows)
    return Share(
        asked_costs(world.population, plan.extras), plan.permitted_LE, plan.trainable_LE, plan.top_k, own_rows=own
    )
