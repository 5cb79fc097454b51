"""One round: plan, train, sum, apply."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from fedmoe_core.base.rng import counter_rng
from fedmoe_core.config.run_config import Config
from fedmoe_core.messages.codec import report_of, update_of
from fedmoe_core.messages.plan import ExpertPlan
from fedmoe_core.messages.update import ClientUpdate, refused
from fedmoe_core.server.accumulator import Accumulator
from fedmoe_core.server.fixed_point import SumSettings
from fedmoe_core.server.state import ServerState
from fedmoe_core.simulation.clock.times import RoundTime, lateness, round_time
from fedmoe_core.simulation.cohorts.cutting import Group
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


def play_round(world: Federation, state: ServerState, observer: Observer) -> tuple[ServerState, Round]:
    """Play one round: the server plans, clients train, exact sums meet, the server applies."""
    config, ranks, began = world.config, world.ranks, time.perf_counter()

    reports, cohorts = [], []
    with ranks.together(f"training round {state.round + 1}"):
        plans = world.algorithm.plan(state, sample_clients(config, state.round, absent=world.population.absent))
        groups = world.groups(plans)
        sums = _accumulator(world)
        engine = time.perf_counter() - began
        with world.training(state, ranks.mine(groups, [group.flops for group in groups])) as in_turn:
            for group, answers in in_turn:
                training, peak = time.perf_counter(), 0
                for answer in answers:
                    update, plan, peak = answer.update, answer.plan, answer.memory_bytes
                    checking = time.perf_counter()
                    reports.append(report_of(_admit(world, update, plan, sums)))
                    engine += time.perf_counter() - checking + answer.extract_seconds
                    if config.ranks == 1:
                        record = client_record(state.round + 1, update, plan, world.population.budgets)
                        observer.on_client(state.round + 1, plan.client, record)
                if peak:
                    cohorts.append(_cohort_record(group, peak, time.perf_counter() - training))

    summing = time.perf_counter()
    if ranks.world > 1:
        with ranks.meeting():
            sums.all_reduce()
    gathered = ranks.gather([reports, cohorts])
    updates = sorted((update_of(report) for part, _ in gathered for report in part), key=lambda update: update.client)
    together = sorted((record for _, part in gathered for record in part), key=lambda record: record["clients"])
    applied = sums.accepted >= config.min_clients
    if applied:
        state = world.algorithm.advance(state, sums.sums(), updates)
    else:
        state = state.advance(state.params, {}, [update.client for update in updates])
    virtual, now = round_time(world.population, updates), time.perf_counter()
    spent = now - began, engine + now - summing
    return state, Round(state.round - 1, plans, updates, applied, *spent, together, virtual)


def sample_clients(config: Config, round: int, *, absent: Collection[int] = ()) -> list[int]:
    """Draw the clients of a round from those that are not ``absent``, ascending; every rank draws the same."""
    present = [client for client in range(config.clients) if client not in absent]
    count = min(config.clients_per_round or config.clients, len(present))
    rng = counter_rng(config.seed, "sample", round)
    return sorted(present[int(place)] for place in rng.choice(len(present), size=count, replace=False))


def _cohort_record(group: Group, peak: int, seconds: float) -> dict[str, Any]:
    """What a round's line tells of one cohort."""
    clients = [plan.client for plan in group.plans]
    predicted = group.predicted_bytes
    return {"clients": clients, "predicted_bytes": predicted, "memory_bytes": peak, "seconds": seconds}


def _admit(world: Federation, update: ClientUpdate, plan: ExpertPlan, sums: Accumulator) -> ClientUpdate:
    """Sum the update, or refuse it by name: it broke its budget, came late, or is not what was asked for."""
    if over := plan.budget.violations(update.cost):
        # Without a plan that fits, no client trains: so what was predicted was wrong, and the log says that.
        before = f"{update.error}; " if update.status == "failed" else ""
        return refused(update, f"{before}over budget, though its plan fits: {over[0]}")
    if update.status == "ok" and (late := lateness(world.population, update)):
        return refused(update, late, status="late")
    outcome = sums.add(update, plan)
    if outcome.accepted or update.status == "failed":
        return update
    return refused(update, outcome.reason)


def _accumulator(world: Federation) -> Accumulator:
    """Empty exact sums for one round of this run."""
    rule, config = world.config.aggregation, world.config
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
        settings,
        lr=config.train.lr,
        train_dense=any(spec.kind == "dense" for spec in specs),
        device=world.ranks.device,
    )
