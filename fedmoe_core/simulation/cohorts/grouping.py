"""Who trains with whom in a run of MoE language models, the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedmoe_core.base.tensor_key import TensorKey
from fedmoe_core.budget.cohort_memory import Share, probing_memory
from fedmoe_core.layer.router_loss import EarlyLoss
from fedmoe_core.messages.plan import ExpertPlan
from fedmoe_core.server.planning import asked_costs
from fedmoe_core.simulation.cohorts.cutting import Group, each_alone, in_cohorts, side_by_side
from fedmoe_core.simulation.cohorts.dry_step import CohortMeter
from fedmoe_core.simulation.world import World, local_settings


def grouped(world: World, plans: Sequence[ExpertPlan]) -> list[Group]:
    """Put the plans of a round into groups: cohorts where that is possible, else single clients with the reason.

    Raises:
        ValueError: as ``in_cohorts``.
    """
    meter = world.cohorts
    if meter is None:
        return each_alone(plans, "" if world.config.cohort.clients == 1 else _never(world))
    where = world.config, world.ranks.device
    return in_cohorts(plans, _Metered.of(world, meter, plans), _kind, _asks_more, limits=where)


def judged_together(world: World, meter: CohortMeter, plans: Sequence[ExpertPlan]) -> list[list[ExpertPlan]]:
    """Cut the clients' own models into cohorts that are evaluated at once, the same on every rank."""
    where = world.config, world.ranks.device
    return side_by_side(plans, _Metered.of(world, meter, plans), _kind, limits=where)


@dataclass(frozen=True)
class _Metered:
    """The meter's answers by plan."""

    meter: CohortMeter
    shares: dict[int, Share]

    @classmethod
    def of(cls, world: World, meter: CohortMeter, plans: Sequence[ExpertPlan]) -> _Metered:
        """Ask about these plans."""
        return cls(meter, {plan.client: _share(world, plan) for plan in plans})

    def memory(self, plans: Sequence[ExpertPlan]) -> int:
        """Predict the peak of a cohort: of its step, or of what its clients measure before and after."""
        return max(self.meter.memory([self.shares[plan.client] for plan in plans]), self._probing(plans))

    def bound(self, plans: Sequence[ExpertPlan]) -> int:
        """Bound it from a cohort of two."""
        return max(self.meter.bound([self.shares[plan.client] for plan in plans]), self._probing(plans))

    def _probing(self, plans: Sequence[ExpertPlan]) -> int:
        before = [plan.predicted.memory_bytes for plan in plans if plan.extras.before is not None]
        after = [plan for plan in plans if plan.extras.after is not None]
        asked = [(self.shares[plan.client], plan.extras.surcharge.memory_bytes) for plan in after]
        return max([*before, probing_memory([self.shares[plan.client] for plan in plans], asked)])


def _never(world: World) -> str:
    """Why this run has no cohorts though its configuration asks for them."""
    if local_settings(world.config, type(world.algorithm)).trunk == "fedavg":
        return "its trunk trains"
    return "the model's adapter has no cohorts"


def _asks_more(plan: ExpertPlan) -> str:
    """What a plan asks of its client that no cohort can do."""
    return "" if plan.extras.per_batch is None else "it chooses experts for every batch"


def _kind(plan: ExpertPlan) -> tuple[object, ...]:
    """What clients of one cohort agree in."""
    extras = plan.extras
    return plan.top_k, plan.local_steps, extras.lora_rank, extras.train_router, extras.out_scale_L is None


def _share(world: World, plan: ExpertPlan) -> Share:
    own = any(TensorKey.parse(key).name not in ("router", "router_bias") for key in plan.extras.rows)
    costs, aux = asked_costs(world.population, plan.extras), plan.extras.aux
    return Share(
        replace(costs, aux_tables=aux.others) if isinstance(aux, EarlyLoss) else costs,
        plan.permitted_LE,
        plan.trainable_LE,
        plan.top_k,
        own_rows=own,
        lora_rank=plan.extras.lora_rank,
        early=isinstance(aux, EarlyLoss),
    )
