"""One round: plan, train, sum, apply."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from fedmoe_core.base.rng import counter_rng
from fedmoe_core.client.train import train_client
from fedmoe_core.config.run_config import Config, TrainConfig
from fedmoe_core.data.batches import Batch, client_batches
from fedmoe_core.messages.codec import report_of, update_of
from fedmoe_core.messages.plan import ExpertPlan
from fedmoe_core.messages.update import ClientUpdate, refused
from fedmoe_core.server.accumulator import Accumulator
from fedmoe_core.server.fixed_point import SumSettings
from fedmoe_core.server.planning import asked_costs
from fedmoe_core.server.state import ServerState
from fedmoe_core.simulation.directory.lines import client_record
from fedmoe_core.simulation.observer import Observer
from fedmoe_core.simulation.world import World, local_settings, validation_batches


@dataclass(frozen=True)
class Round:
    """What a round left in addition to the next state."""

    index: int  # from 0
    plans: list[ExpertPlan]
    updates: list[ClientUpdate]  # of all ranks, by client; no deltas
    applied: bool
    seconds: float
    engine_seconds: float  # plan, extract, check, aggregate: everything but training


def play_round(world: World, state: ServerState, observer: Observer) -> tuple[ServerState, Round]:
    """Play one round: the server plans, clients train, exact sums meet, the server applies."""
    config, ranks, began = world.config, world.ranks, time.perf_counter()

    plans = world.algorithm.plan(state, sample_clients(config, state.round))
    sums = _accumulator(world)
    engine = time.perf_counter() - began
    reports = []
    for plan in ranks.mine(plans, [plan.predicted.flops for plan in plans]):
        update, extract_seconds = _train_one(world, state, plan)
        checking = time.perf_counter()
        reports.append(report_of(_admit(update, plan, sums)))
        engine += time.perf_counter() - checking + extract_seconds
        if config.ranks == 1:
            record = client_record(state.round + 1, update, plan, world.population.budgets)
            observer.on_client(state.round + 1, plan.client, record)

    summing = time.perf_counter()
    if ranks.world > 1:
        with ranks.meeting():
            sums.all_reduce()
    gathered = [report for part in ranks.gather(reports) for report in part]
    updates = sorted((update_of(report) for report in gathered), key=lambda update: update.client)
    applied = sums.accepted >= config.min_clients
    if applied:
        state = world.algorithm.advance(state, sums.sums(), updates)
    else:
        state = state.advance(state.params, {}, [update.client for update in updates])
    now = time.perf_counter()
    return state, Round(state.round - 1, plans, updates, applied, now - began, engine + now - summing)


def sample_clients(config: Config, round: int) -> list[int]:
    """Draw the clients of a round, ascending; every rank draws the same."""
    count = config.clients_per_round or config.clients
    rng = counter_rng(config.seed, "sample", round)
    return sorted(int(client) for client in rng.choice(config.clients, size=count, replace=False))


def round_settings(world: World, round: int) -> TrainConfig:
    """Return local training at this round's learning rate: from lr to lr_final of it along half a cosine."""
    train = local_settings(world.config, type(world.algorithm))
    done = round / max(1, world.config.rounds - 1)
    factor = train.lr_final + (1 - train.lr_final) * 0.5 * (1 + math.cos(math.pi * done))
    return replace(train, lr=train.lr * factor)


def _train_one(world: World, state: ServerState, plan: ExpertPlan) -> tuple[ClientUpdate, float]:
    """One client's training and the update its algorithm makes of it."""
    train, device = round_settings(world, plan.round), world.ranks.device
    data = world.data.clients[plan.client]

    def draw() -> Iterator[Batch]:
        batches = client_batches(
            data.private,
            seed=world.config.seed,
            round=plan.round,
            client=plan.client,
            steps=plan.local_steps,
            batch_size=train.batch_size,
            seq_len=train.seq_len,
        )
        return (batch.to(device) for batch in batches)

    result = train_client(
        world.adapter,
        state.params,
        plan,
        draw(),
        train=train,
        costs=asked_costs(world.population, plan.extras),
        class_shares_C=world.data.class_shares(plan.client),
        redraw=draw,
        validation=lambda: (batch.to(device) for batch in validation_batches(data, world.config)),
    )
    return world.algorithm.answer(plan, result), result.extract_seconds


def _admit(update: ClientUpdate, plan: ExpertPlan, sums: Accumulator) -> ClientUpdate:
    """Sum the update, or refuse it by name: it broke its budget, or it is not what was asked for."""
    if over := plan.budget.violations(update.cost):
        # Without a plan that fits, no client trains: so what was predicted was wrong, and the log says that.
        before = f"{update.error}; " if update.status == "failed" else ""
        return refused(update, f"{before}over budget, though its plan fits: {over[0]}")
    outcome = sums.add(update, plan)
    if outcome.accepted or update.status == "failed":
        return update
    return refused(update, outcome.reason)


def _accumulator(world: World) -> Accumulator:
    """Empty exact sums for one round of this run."""
    rule, config = world.config.aggregation, world.config
    settings = SumSettings(
        scale_bits=rule.scale_bits,
        weight_bits=rule.weight_bits,
        value_bound=rule.value_bound,
        norm_bound=rule.norm_bound,
        max_clients=config.clients_per_round or config.clients,
    )
    train = local_settings(config, type(world.algorithm))
    specs = world.adapter.spec.trained(train_dense=train.trunk == "fedavg")
    return Accumulator(
        specs,
        settings,
        lr=config.train.lr,
        train_dense=any(spec.kind == "dense" for spec in specs),
        device=world.ranks.device,
    )
