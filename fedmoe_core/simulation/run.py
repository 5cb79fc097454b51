"""The simulator: a round is plan, train, sum, apply; a run is rounds, each committed before the next begins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from fedmoe_core.base.files import require_file
from fedmoe_core.base.garbage import older_objects_skipped
from fedmoe_core.config.run_config import Config, is_plain
from fedmoe_core.model.plain import PlainModel
from fedmoe_core.model.spec import model_hash
from fedmoe_core.privacy.account import rounds_of, stopped
from fedmoe_core.privacy.chance import Secret
from fedmoe_core.server.state import ServerState, unpack_state
from fedmoe_core.simulation.buffered import (
    PREFIX,
    InFlight,
    pack_in_flight,
    play_step,
    require_in_flight,
    unpack_in_flight,
)
from fedmoe_core.simulation.directory.checkpoint import load_checkpoint
from fedmoe_core.simulation.directory.claim import LARGEST_CONFIG, MARKER, Claim, claimed, held
from fedmoe_core.simulation.directory.lines import group_row, plan_row
from fedmoe_core.simulation.directory.log import RunLog
from fedmoe_core.simulation.directory.secret_file import read_secret
from fedmoe_core.simulation.directory.standing import AFRESH, Standing
from fedmoe_core.simulation.directory.state_check import StateCheck
from fedmoe_core.simulation.identity import Identity
from fedmoe_core.simulation.observer import GroupRow, NullObserver, Observer, PlanRow
from fedmoe_core.simulation.prepare import build_world
from fedmoe_core.simulation.process_group import Ranks, open_ranks
from fedmoe_core.simulation.progress import observer_for
from fedmoe_core.simulation.ranks.agreement import agree_on_sources, agree_on_world
from fedmoe_core.simulation.ranks.devices import crowded, pick_device
from fedmoe_core.simulation.ranks.restart import kind_of_start, share
from fedmoe_core.simulation.round import play_round, sample_clients
from fedmoe_core.simulation.sinks.guard import HURRY, PATIENCE, Watched
from fedmoe_core.simulation.sinks.sink import find_sinks
from fedmoe_core.simulation.worlds.federation import Federation
from fedmoe_core.simulation.worlds.found_plain import found_plain, plain_of, sources_of

Founder = Callable[[Config, Ranks, Observer], Federation]  # reads, measures and builds what the rounds stand on


def run(
    config: Config,
    *,
    adapter: PlainModel | None = None,
    observer: Observer | None = None,
    force: bool = False,
    founder: Founder | None = None,
) -> dict[str, Any]:
    """Train ``config`` from its warm-up to its last round and return what ``summary.json`` holds.

    Args:
        config: what to run; ``config.out`` is the run directory.
        adapter: the plain torch model to train, for a configuration with ``adapter=own``.
        observer: told of every stage, client and round; None shows progress on stderr, ``NullObserver()`` nothing.
        force: replace a run that lies in ``config.out``.
        founder: of a run whose clients are elsewhere (``simulation.remote``); None simulates them here.

    Example:
        >>> from fedmoe_core import Config, simulate
        >>> config = Config.load(overrides=["clients=4", "rounds=2", "warmup.steps=20"])
        >>> config.clients, config.rounds
        (4, 2)
        >>> summary = simulate.run(config)  # doctest: +SKIP

    Raises:
        ValueError, OSError: one sentence that names the offender and the remedy; nothing half-written is left.
    """
    config, plain = config.resolved(), plain_of(config, adapter)
    out = Path(config.out)
    with _among_ranks(config, plain, observer) as (ranks, observer, held_open):
        start = kind_of_start(ranks, config, out, sources=partial(sources_of, config, plain), force=force)
        if start == "go on":
            return _go_on(config, plain, (ranks, observer, held_open), founder=founder)
        claim = None
        with ranks.together("taking the run directory"):
            if ranks.leads:
                claim = held_open.enter_context(claimed(out, force=force or start == "begin again"))
        world = _found(config, plain, ranks, observer) if founder is None else founder(config, ranks, observer)
        agree_on_world(ranks, world)
        world = _keeping(world, Secret.new() if world.config.privacy.secret and ranks.leads else None)
        state = world.algorithm.init(world.params)
        check_budgets(world, state)
        # Only now does an earlier run in this directory go: whatever is wrong with the words has been refused.
        log = None
        with ranks.together("writing the configuration"):
            log = RunLog.create(claim, world) if claim is not None else None
        flying = InFlight() if config.time.mode == "buffered" else None
        return _play(world, (state, flying), log, observer, fresh=True)


def resume(
    run_dir: Path,
    *,
    adapter: PlainModel | None = None,
    observer: Observer | None = None,
    other_code: bool = False,
    founder: Founder | None = None,
) -> dict[str, Any]:
    """Continue an interrupted run after its last committed round; the result is that of a run never interrupted.

    Args:
        run_dir: the directory of the run.
        adapter: the plain torch model that the run was given, where it was.
        observer: as for ``run``.
        other_code: go on although other code, or another torch, began the run; its bits may then differ.
        founder: as for ``run``.

    Raises:
        ValueError: no checkpoint, a damaged one, or one that belongs to another configuration, corpus, model or code;
            or another process is using the directory.
    """
    require_file(run_dir / "config.toml", most=LARGEST_CONFIG)
    config = replace(Config.load(run_dir / "config.toml"), out=str(run_dir))
    plain = plain_of(config, adapter)
    with _among_ranks(config, plain, observer) as among:
        return _go_on(config, plain, among, other_code=other_code, founder=founder)


def _go_on(
    config: Config,
    plain: PlainModel | None,
    among: tuple[Ranks, Observer, ExitStack],
    *,
    other_code: bool = False,
    founder: Founder | None = None,
) -> dict[str, Any]:
    """Play from the last checkpoint, which rank 0 reads; the stack keeps the directory until the run ends."""
    ranks, observer, held_open = among
    run_dir = Path(config.out)
    claim, standing, secret, tensors = None, None, None, dict[str, Tensor]()
    with ranks.together("reading the checkpoint"):
        if ranks.leads:
            claim = held_open.enter_context(held(run_dir))
            saved = load_checkpoint(run_dir / "checkpoint", expected_fingerprint=config.decisive())
            standing = Standing.read(saved.meta, rounds=config.rounds, place=f"{run_dir}/checkpoint")
            _refuse_other_sources(claim, standing, sources_of(config, plain), config, other_code=other_code)
            secret = read_secret(run_dir, standing) if config.privacy.secret else None
            tensors = saved.tensors
    round, tensors = int(ranks.gather(standing and standing.round)[0]), share(ranks, tensors)
    world = _found(config, plain, ranks, observer) if founder is None else founder(config, ranks, observer)
    agree_on_world(ranks, world)
    world = _keeping(world, secret)
    with ranks.together("checking the checkpoint"):
        state, flying = _unpacked(world, tensors, round)
    log = None
    with ranks.together("reading the logs"):
        if claim is not None and standing is not None:
            log = RunLog.reopen(claim, world, standing, state)
    return _play(world, (state, flying), log, observer, fresh=False)


def _keeping(world: Federation, secret: Secret | None) -> Federation:
    """The world with the secret that rank 0 has; as it is where the run has none."""
    if not world.config.privacy.secret:
        return world
    round, key = world.ranks.gather(None if secret is None else [secret.round, secret.key.hex()])[0]
    return world.keeping(Secret(round, bytes.fromhex(key)))


def _unpacked(world: Federation, tensors: dict[str, Tensor], round: int) -> tuple[ServerState, InFlight | None]:
    """Rebuild what a checkpoint saved, once it is known to be what a run of this configuration saves.

    Raises:
        ValueError: it is not; one sentence.
    """
    buffered, device = world.config.time.mode == "buffered", world.ranks.device
    check = StateCheck.of(world, f"{world.config.out}/checkpoint")
    beside = {key: tensor for key, tensor in tensors.items() if buffered and key.startswith(PREFIX)}
    check.require({key: tensor for key, tensor in tensors.items() if key not in beside}, round)
    state = unpack_state(tensors, round=round, device=device)
    _require_memory(world, state)
    if not buffered:
        return state, None
    require_in_flight(check, beside, round)
    return state, unpack_in_flight(tensors, state, device=device)


def _require_memory(world: Federation, state: ServerState) -> None:
    """Refuse an algorithm's memory with which it cannot plan; what is in it only the algorithm knows.

    Raises:
        ValueError: it cannot.
    """
    try:
        if state.memory:
            world.algorithm.plan(state, range(world.config.clients))
    except (KeyError, IndexError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise ValueError(
            f"{world.config.out}/checkpoint holds a memory with which algorithm={world.config.algorithm!r} cannot plan "
            f"({type(error).__name__}: {error!s:.80}); {AFRESH}"
        ) from error


@contextmanager
def _among_ranks(
    config: Config, plain: PlainModel | None, observer: Observer | None
) -> Iterator[tuple[Ranks, Observer, ExitStack]]:
    """Join the other ranks, which must be about to do the same, and watch; the stack ends before the ranks part."""
    with (
        open_ranks(config.ranks, pick_device(config)) as ranks,
        ExitStack() as held_open,
        _watching(config, observer, ranks) as shown,
    ):
        agree_on_sources(ranks, config, partial(sources_of, config, plain))
        if why := crowded(config, ranks.device):
            shown.on_stage(why)
        yield ranks, shown, held_open


def _found(
    config: Config, plain: PlainModel | None, ranks: Ranks, observer: Observer, *, train_warmup: bool = True
) -> Federation:
    """Found a run of a plain model, or of a language model."""
    if plain is not None:
        return found_plain(config, plain, ranks, observer)
    return build_world(config, ranks, observer, train_warmup=train_warmup)


@contextmanager
def _watching(config: Config, observer: Observer | None, ranks: Ranks) -> Iterator[Observer]:
    """The observer of this rank: on rank 0 the caller's, else progress on stderr, and ``watch.sinks`` beside it.

    What this makes is closed whatever happens.
    """
    with ranks.together("loading watch.sinks"):
        sinks = find_sinks(config) if ranks.leads else {}
    if not ranks.leads:
        yield NullObserver()
        return
    screen = observer if observer is not None else observer_for(Console(stderr=True))
    watched = Watched(screen, sinks)
    try:
        yield watched if sinks else screen
        watched.finish(PATIENCE)
    except BaseException:
        watched.finish(HURRY)
        raise
    finally:
        if observer is None:
            screen.close()


def _refuse_other_sources(claim: Claim, standing: Standing, now: Identity, config: Config, *, other_code: bool) -> None:
    """Refuse a checkpoint of another run, or one whose corpus, model or code is not what is here now."""
    place = f"{claim.path}/checkpoint"
    if standing.run != claim.id:
        raise ValueError(
            f"{place} belongs to another run than {claim.path}/config.toml; restore the run's own checkpoint"
        )
    then = Identity.read(standing.identity)
    if then is None:
        raise ValueError(f"{place} does not say which data and model it was made from; start the run afresh")
    if then != Identity.read(claim.facts):
        raise ValueError(f"{place} was made from other data, model or code than {claim.path}/{MARKER} says; {AFRESH}")
    then.require_same_sources(now, str(claim.path), config)
    if not other_code:
        then.require_same_code(now, str(claim.path))


def dry_run(config: Config, *, adapter: PlainModel | None = None, observer: Observer | None = None) -> list[PlanRow]:
    """Plan the first round for each client, before anything trains: what it would hold, and what that would cost.

    Where cohorts are asked for, each client that the first round draws knows with whom it would train. Without a cached
    warm-up the untrained model stands in: the numbers are the same, the chosen experts may differ.

    Raises:
        ValueError: as ``run``, before its warm-up.
    """
    config, plain = config.resolved(), plain_of(config, adapter)
    with open_ranks(config.ranks, pick_device(config)) as ranks:
        observer = observer or NullObserver()
        world = _found(config, plain, ranks, observer, train_warmup=False)
        state = world.algorithm.init(world.params)
        plans, groups = world.algorithm.plan(state, range(config.clients)), dict[int, GroupRow]()
        if config.cohort.clients != 1:
            drawn = sample_clients(config, state.round, absent=world.population.absent)
            for group in world.groups(world.algorithm.plan(state, drawn)):
                groups |= dict.fromkeys((plan.client for plan in group.plans), group_row(world, group))
        return [plan_row(world, plan, groups.get(plan.client)) for plan in plans]


def check_budgets(world: Federation, state: ServerState) -> None:
    """Plan and group every client once: a budget or a cohort that cannot be served is refused before any training."""
    world.groups(world.algorithm.plan(state, range(world.config.clients)))


def _play(
    world: Federation,
    start: tuple[ServerState, InFlight | None],
    log: RunLog | None,
    observer: Observer,
    *,
    fresh: bool,
) -> dict[str, Any]:
    """Rounds from the start to the last, each evaluated, logged and committed; then the summary.

    A buffered run carries its clients in flight beside the state, and its rounds are server steps. A ``fresh`` run has
    the warm model judged first; a resumed one has that line already.
    """
    config, (state, flying), rounds = world.config, start, rounds_of(world.config)
    run = log.run if log is not None else ""
    observer.on_start(_headline(world, state) | {"run": run, "resumed": not fresh})
    if fresh:
        warm = world.evaluate(state)
        with world.ranks.together("writing the logs"):
            if log is not None:
                observer.on_round(0, config.rounds, log.before(warm))
                log.commit(state, None if flying is None else pack_in_flight(flying, state))
    with older_objects_skipped():
        while state.round < rounds:
            if flying is None:
                state, played = play_round(world, state, observer)
            else:
                state, flying, played = play_step(world, state, flying, observer)
            due = state.round % config.eval.every == 0 or state.round == rounds
            held = world.evaluate(state) if due else None
            with world.ranks.together(f"writing round {state.round}"):
                if log is not None:
                    record = log.round(played, held, state)
                    log.commit(state, None if flying is None else pack_in_flight(flying, state))
                    observer.on_round(state.round, config.rounds, record)
    if why := stopped(config):
        observer.on_stage(why)
    summary = log.finish(state, model_hash(state.params)) if log is not None else {}
    world.ranks.wait()
    observer.on_end(summary)
    return summary


def _headline(world: Federation, state: ServerState) -> dict[str, Any]:
    """What the observer is told at the start."""
    config = world.config
    at_once = config.clients_per_round or config.clients
    buffered = {"clients_per_round": config.time.buffer, "in_flight": at_once}
    return {
        "label": world.algorithm.label(config),
        "algorithm": config.algorithm,
        "model": config.adapter if is_plain(config.adapter) else config.model,
        "data": "its own data" if is_plain(config.adapter) else config.data,
        "rounds": config.rounds,
        **(buffered if config.time.mode == "buffered" else {"clients_per_round": at_once}),
        "first_round": state.round,
        "out": config.out,
    }
