"""The simulator: a round is plan, train, sum, apply; a run is rounds, each committed before the next begins."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from fedmoe_core.aggregate import Accumulator, SumSettings, model_hash
from fedmoe_core.batch import Batch, client_batches
from fedmoe_core.checkpoint import Checkpoint, load_checkpoint
from fedmoe_core.client import train_client
from fedmoe_core.config import Config, TrainConfig
from fedmoe_core.evaluate import evaluate_clients, validation_batches
from fedmoe_core.identity import Identity
from fedmoe_core.plan import ExpertPlan
from fedmoe_core.planning import plan_costs
from fedmoe_core.prepare import World, build_world, local_settings, pick_device
from fedmoe_core.progress import NullObserver, Observer, PlanRow, observer_for
from fedmoe_core.ranks import Ranks, open_ranks
from fedmoe_core.records import RunLog, client_record, label_of, plan_row
from fedmoe_core.reports import refused, report_of, update_of
from fedmoe_core.rng import counter_rng
from fedmoe_core.run_directory import Claim, claimed, held
from fedmoe_core.state import ServerState, unpack_state
from fedmoe_core.update import ClientUpdate


@dataclass(frozen=True)
class Round:
    """What a round left in addition to the next state."""

    index: int  # from 0
    plans: list[ExpertPlan]
    updates: list[ClientUpdate]  # of all ranks, by client; no deltas
    applied: bool
    seconds: float
    engine_seconds: float  # plan, extract, check, aggregate: everything but training


def run(config: Config, *, observer: Observer | None = None, force: bool = False) -> dict[str, Any]:
    """Train ``config`` from its warm-up to its last round and return what ``summary.json`` holds.

    Args:
        config: what to run; ``config.out`` is the run directory.
        observer: told of every stage, client and round; None shows progress on stderr, ``NullObserver()`` nothing.
        force: replace a run that lies in ``config.out``.

    Example:
        >>> from fedmoe_core import Config, simulate
        >>> config = Config.load(overrides=["clients=4", "rounds=2", "warmup.steps=20"])
        >>> config.clients, config.rounds
        (4, 2)
        >>> summary = simulate.run(config)  # doctest: +SKIP

    Raises:
        ValueError, OSError: one sentence that names the offender and the remedy; nothing half-written is left.
    """
    config = config.resolved()
    out = Path(config.out)
    with (
        open_ranks(config.ranks, pick_device(config)) as ranks,
        claimed(out, force=force) if ranks.leads else nullcontext() as claim,
        _watching(observer, ranks) as observer,
    ):
        ranks.wait()
        world = build_world(config, ranks, observer)
        state = world.algorithm.init(world.params)
        check_budgets(world, state)
        # Only now does an earlier run in this directory go: whatever is wrong with the words has been refused.
        log = RunLog.create(claim, world) if claim is not None else None
        return _play(world, state, log, observer, fresh=True)


def resume(run_dir: Path, *, observer: Observer | None = None, other_code: bool = False) -> dict[str, Any]:
    """Continue an interrupted run after its last committed round; the result is that of a run never interrupted.

    Args:
        run_dir: the directory of the run.
        observer: as for ``run``.
        other_code: go on although other code, or another torch, began the run; its bits may then differ.

    Raises:
        ValueError: no checkpoint, a damaged one, or one that belongs to another configuration, corpus, model or code;
            or another process is using the directory.
    """
    config = Config.load(run_dir / "config.toml")
    with (
        open_ranks(config.ranks, pick_device(config)) as ranks,
        held(run_dir) if ranks.leads else nullcontext() as claim,
        _watching(observer, ranks) as observer,
    ):
        saved = load_checkpoint(run_dir / "checkpoint", expected_fingerprint=config.decisive())
        config = replace(config, out=str(run_dir))
        if claim is not None:
            _refuse_other_sources(claim, saved, config, other_code=other_code)
        world = build_world(config, ranks, observer)
        state = unpack_state(saved.tensors, round=int(saved.meta["round"]), device=ranks.device)
        log = RunLog.reopen(claim, world, saved.meta) if claim is not None else None
        return _play(world, state, log, observer, fresh=False)


@contextmanager
def _watching(observer: Observer | None, ranks: Ranks) -> Iterator[Observer]:
    """The observer of this rank: the caller's, else progress on stderr, taken off the screen whatever happens."""
    if not ranks.leads:
        yield NullObserver()
    elif observer is not None:
        yield observer
    else:
        shown = observer_for(Console(stderr=True))
        try:
            yield shown
        finally:
            shown.close()


def _refuse_other_sources(claim: Claim, saved: Checkpoint, config: Config, *, other_code: bool) -> None:
    """Refuse a checkpoint of another run, or one whose corpus, model or code is not what is here now."""
    place = f"{claim.path}/checkpoint"
    if saved.meta.get("run") != claim.id:
        raise ValueError(
            f"{place} belongs to another run than {claim.path}/config.toml; restore the run's own checkpoint"
        )
    then, now = Identity.read(saved.meta.get("identity") or {}), Identity.of(config)
    if then is None:
        raise ValueError(f"{place} does not say which data and model it was made from; start the run afresh")
    then.require_same_sources(now, str(claim.path), config)
    if not other_code:
        then.require_same_code(now, str(claim.path))


def dry_run(config: Config, *, observer: Observer | None = None) -> list[PlanRow]:
    """Plan the first round for each client, before anything trains: what it would hold, and what that would cost.

    Without a cached warm-up the untrained model stands in: the numbers are the same, the chosen experts may differ.
    """
    config = config.resolved()
    with open_ranks(config.ranks, pick_device(config)) as ranks:
        world = build_world(config, ranks, observer or NullObserver(), train_warmup=False)
        state = world.algorithm.init(world.params)
        return [plan_row(world, plan) for plan in world.algorithm.plan(state, range(config.clients))]


def check_budgets(world: World, state: ServerState) -> None:
    """Plan every client once, so that a budget that cannot be served is refused before anything trains."""
    world.algorithm.plan(state, range(world.config.clients))


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
        state = world.algorithm.apply(state, sums.sums(), updates)
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
        costs=plan_costs(world.population, plan),
        class_shares_C=world.data.class_shares(plan.client),
        redraw=draw,
        validation=lambda: (batch.to(device) for batch in validation_batches(data, world.config)),
    )
    return world.algorithm.client(plan, result), result.extract_seconds


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


def _play(world: World, state: ServerState, log: RunLog | None, observer: Observer, *, fresh: bool) -> dict[str, Any]:
    """Rounds from ``state`` to the last, each evaluated, logged and committed; then the summary.

    A ``fresh`` run has the warm model judged first; a resumed one has that line already.
    """
    config = world.config
    observer.on_start(_headline(world, state))
    if fresh:
        warm = evaluate_clients(world, state)
        if log is not None:
            observer.on_round(0, config.rounds, log.before(warm))
            log.commit(state)
    while state.round < config.rounds:
        state, played = play_round(world, state, observer)
        due = state.round % config.eval.every == 0 or state.round == config.rounds
        held = evaluate_clients(world, state) if due else None
        if log is not None:
            record = log.round(played, held, state)
            log.commit(state)
            observer.on_round(state.round, config.rounds, record)
    summary = log.finish(state, model_hash(state.params)) if log is not None else {}
    world.ranks.wait()
    observer.on_end(summary)
    return summary


def _headline(world: World, state: ServerState) -> dict[str, Any]:
    """What the observer is told at the start."""
    config = world.config
    return {
        "label": label_of(config),
        "algorithm": config.algorithm,
        "model": config.model,
        "data": config.data,
        "rounds": config.rounds,
        "clients_per_round": config.clients_per_round or config.clients,
        "first_round": state.round,
        "out": config.out,
    }
