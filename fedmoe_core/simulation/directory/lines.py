"""The lines of a run's logs, each made from the records of a round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fedmoe_core.budget.limits import NOTHING, Budget
from fedmoe_core.messages.plan import ExpertPlan
from fedmoe_core.messages.update import ClientUpdate
from fedmoe_core.server.guard.combine import Told
from fedmoe_core.simulation.clock.times import RoundTime
from fedmoe_core.simulation.cohorts.cutting import Group
from fedmoe_core.simulation.evaluation import HeldOut
from fedmoe_core.simulation.observer import GroupRow, PlanRow
from fedmoe_core.simulation.worlds.federation import Federation


def group_row(world: Federation, group: Group) -> GroupRow:
    """Make one line of the dry run's groups."""
    names = tuple(world.holdings.clients[plan.client] for plan in group.plans)
    return GroupRow(names, group.predicted_bytes, group.alone)


def plan_row(world: Federation, plan: ExpertPlan, group: GroupRow | None = None) -> PlanRow:
    """Make one line of the dry run: the plan and the device's own budget, which FedAvg may pass."""
    return PlanRow(
        client=world.holdings.clients[plan.client],
        experts_held=tuple(int(n) for n in plan.permitted_LE.sum(axis=1)),
        trainable=int(plan.trainable_LE.sum()),
        predicted=plan.predicted,
        budget=world.population.budgets[plan.client],
        local_steps=plan.local_steps,
        top_k=plan.top_k,
        samples=int(world.population.samples_C[plan.client]),
        deadline=world.config.time.deadline,
        group=group,
    )


def results_of(held: HeldOut) -> dict[str, Any]:
    """Make the part of a round's line that an evaluation fills."""
    found = {
        "loss": held.loss,
        "accuracy": held.accuracy,
        "loss_clients": held.loss_C,
        "accuracy_clients": held.accuracy_C,
        "evaluate_seconds": held.seconds,
    }
    if held.personal_loss_C is not None:
        found |= {"personal_loss_C": held.personal_loss_C, "personal_accuracy_C": held.personal_accuracy_C}
    return found


def guard_facts(told: Told | None) -> dict[str, Any]:
    """Make the part of a round's line that says what the guard of the sums did; empty without one."""
    if told is None:
        return {}
    clients = {name: {str(c): n for c, n in sorted(getattr(told, name).items())} for name in ("bounded", "left_out")}
    return {"guard": {"rule": told.rule, **clients, "few": told.few, "below_quorum": told.below_quorum}}


def guard_summary(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sum up what the guard did in a run; empty without one."""
    guards = [line["guard"] for line in rounds if "guard" in line]
    if not guards:
        return {}
    clients = {name: sum(sum(told[name].values()) for told in guards) for name in ("bounded", "left_out")}
    parts = {name: sum(told[name] for told in guards) for name in ("few", "below_quorum")}
    return {"guard": {"rule": guards[0]["rule"], **clients, **parts}}


def client_record(number: int, update: ClientUpdate, plan: ExpertPlan, budgets: tuple[Budget, ...]) -> dict[str, Any]:
    """Make one client's line of metrics.jsonl; validation and metrics are there if the algorithm has them."""
    found: dict[str, Any] = {}
    if update.validation is not None:
        count = update.validation.count
        found["validation_loss"] = update.validation.loss_sum / count
        found["validation_accuracy"] = update.validation.correct / count
    if update.metrics:
        found["metrics"] = dict(update.metrics)
    return {
        "type": "client",
        "round": number,
        "client": update.client,
        "tier": budgets[update.client].name,
        "held_LE": plan.permitted_LE.astype(int).tolist(),
        "trained_LE": plan.trainable_LE.astype(int).tolist(),
        "loss_first": update.loss_first,
        "loss_last": update.loss_last,
        "steps": update.steps,
        "top_k": plan.top_k,
        "status": update.status,
        "error": update.error,
        **({"cohort": update.cohort, "alone": update.alone} if update.cohort > 1 or update.alone else {}),
        **found,
    }


def ledger_line(
    number: int, update: ClientUpdate, plan: ExpertPlan, budgets: tuple[Budget, ...], time: RoundTime | None = None
) -> dict[str, Any]:
    """Make one client's line of ledger.jsonl; ``bound_by`` is there where other limits bound the plan.

    ``real.virtual_seconds`` is what its device takes for what it did; ``clock`` has the straggling and what came of it.
    ``wire`` has the bytes of the messages themselves, where clients are real devices.
    ``flight`` is there in a buffered run: the model that the client took along, how stale, when it left and arrived.
    """
    budget = budgets[update.client]
    return {
        "round": number,
        "client": update.client,
        "budget": budget.record(),
        **({} if plan.budget == budget else {"bound_by": plan.budget.record()}),
        "predicted": budget.record_of(plan.predicted),
        "real": budget.record_of(update.cost),
        **({} if time is None else {"clock": asdict(time.clients[update.client])}),
        **({} if time is None or not time.flights else {"flight": _flight(time, update.client)}),
        **({} if update.cohort == 1 else {"cohort": update.cohort}),
        **({} if update.wire is None else {"wire": asdict(update.wire)}),
        **({} if plan.extras.surcharge == NOTHING else {"surcharge": budget.record_of(plan.extras.surcharge)}),
    }


def _flight(time: RoundTime, client: int) -> dict[str, Any]:
    flight = time.flights[client]
    return {
        "version": flight.version,
        "staleness": time.staleness[client],
        "dispatched": flight.dispatched,
        "arrived": flight.arrives,
    }
