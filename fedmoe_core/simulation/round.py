"""One round: plan, train, sum, apply."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from fedmoe_core.base.rng import counter_rng
from fedmoe_core.config.run_config import Config
from fedmoe_core.messages.codec import report_of, update_of
from fedmoe_core.messages.plan import ExpertPlan
from fedmoe_core.messages.update import ClientUpdate, refused
from fedmoe_core.privacy.central import Central
from fedmoe_core.privacy.chance import Secret
from fedmoe_core.privacy.dropping import dropped
from fedmoe_core.privacy.masked import MaskedSums
from fedmoe_core.server.accumulator import Accumulator
from fedmoe_core.server.fixed_point import SumSettings
from fedmoe_core.server.guard.combine import Told
from fedmoe_core.server.guard.settings import Guard
from fedmoe_core.server.schema import blank, received
from fedmoe_core.server.state import Population, ServerState
from fedmoe_core.simulation.clock.times import RoundTime, lateness, round_time
from fedmoe_core.simulation.cohorts.cutting import Group
from fedmoe_core.simulation.cohorts.training import Answer, Task
from fedmoe_core.simulation.directory.lines import client_record
from fedmoe_core.simulation.observer import Observer
from fedmoe_core.simulation.worlds.federation import Federation


@dataclass(frozen=True)
class Round:
    """What a round left in addition to the next state."""

    index: int  # from 0
    plans: list[ExpertPlan]
    updates: list[ClientUpdate]  # of all ranks, by client; no deltas
    applied: bool
    seconds: float
    engine_seconds: float  # plan, extract, check, aggregate: everything but training
    cohorts: list[dict[str, Any]]  # of all ranks: who trained at once, the peak predicted and measured
    time: RoundTime | None = None  # virtual; None where the run has no clock
    guard: Told | None = None  # what a guard of the sums did; None where the run has none


@dataclass(frozen=True)
class Trained:
    """What this rank's clients of a round left: their sums, and reports for the other ranks."""

    plans: list[ExpertPlan]  # of all ranks
    sums: Accumulator | MaskedSums
    reports: list[dict[str, Any]]
    cohorts: list[dict[str, Any]]
    began: float  # time.perf_counter() at the start of the round
    engine_seconds: float


def play_round(world: Federation, state: ServerState, observer: Observer) -> tuple[ServerState, Round]:
    """Play one round: the server plans, clients train, exact sums meet, the server applies."""
    began = time.perf_counter()
    with world.ranks.together(f"training round {state.round + 1}"):
        clients = sample_clients(world.config, state.round, absent=world.population.absent, secret=world.secret)
        groups = world.groups(world.algorithm.plan(state, clients))
        trained = train(world, state.round, [Task(state, group) for group in groups], observer, began=began)
    state, played = settle(world, state, trained)
    return state, replace(played, time=round_time(world.population, played.updates))


def train(world: Federation, index: int, tasks: Sequence[Task], observer: Observer, *, began: float) -> Trained:
    """Train this rank's share of the tasks of a round, counted from 0; every update is summed, or refused by name."""
    plans = sorted((plan for task in tasks for plan in task.group.plans), key=lambda plan: plan.client)
    reports, cohorts, sums = [], [], _sums(world, index, plans)
    engine = time.perf_counter() - began
    with world.training(world.ranks.mine(tasks, [task.group.flops for task in tasks])) as in_turn:
        for task, answers in in_turn:
            training, peak = time.perf_counter(), 0
            for answer in answers:
                plan, peak, checking = answer.plan, answer.memory_bytes, time.perf_counter()
                update = _admitted(world, answer, sums, share=task.share)
                reports.append(report_of(update))
                engine += time.perf_counter() - checking + answer.extract_seconds
                if world.config.ranks == 1:
                    record = client_record(index + 1, update, plan, world.population.budgets)
                    observer.on_client(index + 1, plan.client, record)
            if peak:
                cohorts.append(_cohort_record(task.group, peak, time.perf_counter() - training))
    return Trained(plans, sums, reports, cohorts, began, engine)


def settle(world: Federation, state: ServerState, trained: Trained) -> tuple[ServerState, Round]:
    """Meet the other ranks and apply what all clients changed; the round's virtual time is still to be told."""
    ranks, sums, summing = world.ranks, trained.sums, time.perf_counter()
    if ranks.world > 1 and isinstance(sums, Accumulator):
        with ranks.meeting():
            sums.all_reduce()
    gathered = ranks.gather([trained.reports, trained.cohorts])
    updates = sorted((update_of(report) for part, _ in gathered for report in part), key=lambda update: update.client)
    if isinstance(sums, MaskedSums):
        with ranks.meeting():
            sums, updates = sums.opened(updates, trained.plans, together=ranks.world > 1)
    told = sums.close(history_RG=state.norms_RG, gather=ranks.gather_tensors)
    together = sorted((record for _, part in gathered for record in part), key=lambda record: record["clients"])
    private = Central.of(world.config, world.secret)
    applied = private is not None or sums.accepted >= world.config.min_clients
    if applied:
        found = sums.sums() if private is None else private.released(sums.sums(), state.round)
        state = replace(world.algorithm.advance(state, found, updates), norms_RG=told.history_RG)
    else:
        state = state.advance(state.params, {}, [update.client for update in updates])
    now = time.perf_counter()
    spent = now - trained.began, trained.engine_seconds + now - summing
    guarded = None if sums.guard == Guard() else told
    return state, Round(state.round - 1, trained.plans, updates, applied, *spent, together, guard=guarded)


def sample_clients(
    config: Config, round: int, *, absent: Collection[int] = (), secret: Secret | None = None
) -> list[int]:
    """Draw the clients of a round from those that are not ``absent``, ascending; every rank draws the same.

    A private round draws each client by itself, so that their number differs from round to round, and by the ``secret``
    of a run that has one.
    """
    present = [client for client in range(config.clients) if client not in absent]
    if (private := Central.of(config, secret)) is not None:
        return private.sample(round, present)
    count = min(config.clients_per_round or config.clients, len(present))
    rng = counter_rng(config.seed, "sample", round)
    return sorted(present[int(place)] for place in rng.choice(len(present), size=count, replace=False))


def _cohort_record(group: Group, peak: int, seconds: float) -> dict[str, Any]:
    """What a round's line tells of one cohort."""
    clients = [plan.client for plan in group.plans]
    predicted = group.predicted_bytes
    return {"clients": clients, "predicted_bytes": predicted, "memory_bytes": peak, "seconds": seconds}


def _admitted(world: Federation, answer: Answer, sums: Accumulator | MaskedSums, *, share: float) -> ClientUpdate:
    """Sum what came, or refuse it by name; what travelled is on record either way."""
    if answer.refusal:
        update = blank(answer.plan, answer.refusal)
    else:
        update = _admit(world, answer.update, answer.plan, sums, share=share)
    return update if answer.wire is None else replace(update, wire=answer.wire)


def _admit(
    world: Federation, update: ClientUpdate, plan: ExpertPlan, sums: Accumulator | MaskedSums, *, share: float
) -> ClientUpdate:
    """Sum the update, or refuse it by name: it broke its budget, came late, or is not what was asked for."""
    update = received(update, plan)
    if over := plan.budget.violations(update.cost):
        # Without a plan that fits, no client trains: so what was predicted was wrong, and the log says that.
        before = f"{update.error}; " if update.status == "failed" else ""
        return refused(update, plan, f"{before}over budget, though its plan fits: {over[0]}")
    if update.status == "ok":
        if late := lateness(world.population, update):
            return refused(update, plan, late, status="late")
        if claim := _false_claim(world.population, update):
            return refused(update, plan, claim)
        if gone := dropped(world.config, plan.round, plan.client):
            return refused(update, plan, gone)
    if (private := Central.of(world.config, world.secret)) is not None:
        share *= private.share(update, plan, sums.specs)
    outcome = sums.add(update, plan, share=share)
    if outcome.accepted or update.status == "failed":
        return update
    return refused(update, plan, outcome.reason)


def _false_claim(population: Population, update: ClientUpdate) -> str:
    """Say which weight the client gives itself that the server knows better; empty where there is none."""
    for name, claimed, known in (
        ("samples", update.samples, int(population.samples_C[update.client])),
        ("sample_weight", update.sample_weight, population.sample_weight(update.client)),
    ):
        if claimed != known:
            return f"{name} is {claimed:g}, and the server counts {known:g}"
    return ""


def _sums(world: Federation, index: int, plans: Sequence[ExpertPlan]) -> Accumulator | MaskedSums:
    """Empty sums for a round of these plans, in the clear or under masks."""
    if not world.config.privacy.secure:
        return _accumulator(world)
    return MaskedSums(world.config, index, [plan.client for plan in plans], partial(_accumulator, world))


def _accumulator(world: Federation) -> Accumulator:
    """Empty exact sums for one round of this run."""
    rule, config = world.config.aggregation, world.config
    private = Central.of(config, world.secret)
    settings = SumSettings(
        scale_bits=rule.scale_bits,
        weight_bits=rule.weight_bits,
        value_bound=rule.value_bound,
        norm_bound=rule.norm_bound,
        max_clients=config.clients_per_round or config.clients,
    )
    specs = world.learning
    return Accumulator(
        specs,
        settings if private is None else private.settings,
        lr=config.train.lr if private is None else None,  # the noise is 2^23 times what the sums resolve
        train_dense=any(spec.kind == "dense" for spec in specs),
        device=world.ranks.device,
        guard=Guard(**vars(config.guard)),
        second_visit=world.algorithm.sees_conflict,
    )
