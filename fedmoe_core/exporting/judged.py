"""What a run's report judged: its last state read back, the plan of a client's own model, and that it is still so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fedmoe_core.algorithms.base import algorithm_class
from fedmoe_core.base.tensor_key import TensorKey
from fedmoe_core.config.run_config import Config, is_plain
from fedmoe_core.layer.state import STEERING
from fedmoe_core.messages.plan import ExpertPlan
from fedmoe_core.reporting.run import Run, read_runs
from fedmoe_core.server.state import ServerState, unpack_state
from fedmoe_core.simulation.buffered import PREFIX
from fedmoe_core.simulation.directory.checkpoint import load_checkpoint
from fedmoe_core.simulation.directory.claim import CHECKPOINT, JSON_NAME, read_facts
from fedmoe_core.simulation.directory.standing import Standing
from fedmoe_core.simulation.directory.state_check import StateCheck
from fedmoe_core.simulation.evaluation import evaluate_global, own_models
from fedmoe_core.simulation.identity import Identity
from fedmoe_core.simulation.observer import Observer
from fedmoe_core.simulation.prepare import build_world
from fedmoe_core.simulation.process_group import open_ranks
from fedmoe_core.simulation.ranks.devices import pick_device
from fedmoe_core.simulation.worlds.moe import MoEWorld

SAME = 1e-4  # relative difference of two losses of one model: other sums, other machine; a round changes more


@dataclass(frozen=True)
class Opened:
    """A run as its last checkpoint left it.

    Attributes:
        run: its records.
        world, state: what it stood on, made again, and the state of the checkpoint.
        standing: what the checkpoint says of the run.
        versions: of the software that wrote it.
    """

    run: Run
    world: MoEWorld
    state: ServerState
    standing: Standing
    versions: Mapping[str, str]

    def figure(self, kind: str, client: int | None, *, first: bool = False) -> float | None:
        """Return a held-out figure on record after the checkpoint's round, or before the first; None = not judged then.

        Args:
            kind: "loss" or "accuracy".
            client: whose own model; None = the global one.
            first: before the first round.
        """
        for line in self.run.rounds:
            if line["round"] == (0 if first else self.standing.round):
                own = line.get(f"personal_{kind}_C")
                found = line.get(kind) if client is None else own and own[client]
                return None if found is None else float(found)
        return None

    def recorded(self, client: int | None) -> float | None:
        """Return the held-out loss on record after the checkpoint's round, of the global model or a client's own."""
        return self.figure("loss", client)


def read_config(run_dir: Path) -> Config:
    """Read the configuration of a run that can be exported.

    Raises:
        ValueError: there is no run, it has no checkpoint, or its model is a plain torch module; one sentence.
    """
    if not (run_dir / "config.toml").is_file() or read_facts(run_dir) is None:
        raise ValueError(f"{run_dir} holds no run; give the directory that a run named as out")
    config = Config.load(run_dir / "config.toml")
    if is_plain(config.adapter):
        raise ValueError(
            f"{run_dir} has trained a plain torch model, which transformers does not know; read its tensors with "
            "fedmoe_core.simulation.directory.checkpoint.load_checkpoint(RUN/checkpoint) and save them yourself"
        )
    if not (run_dir / CHECKPOINT / JSON_NAME).exists():
        raise ValueError(f"{run_dir} has no checkpoint yet; let the run finish a round, then export it")
    return config


@contextmanager
def opened(run_dir: Path, config: Config, observer: Observer, *, warm: bool) -> Iterator[Opened]:
    """Read a run back within the block; nothing in its directory changes.

    Args:
        run_dir: its directory.
        config: as ``read_config``.
        observer: told of each stage.
        warm: whether the model that federation started from is needed; it may have to be warmed up again.

    Raises:
        ValueError, OSError: the checkpoint is damaged or another run's, or data or model are not what they were.
    """
    (run,) = read_runs([run_dir])
    if any("wire" in line for line in run.ledger):
        raise ValueError(
            f"{run_dir} was trained on real devices, whose data are not here to judge it by; only simulated runs can "
            "be exported"
        )
    place = f"{run_dir}/{CHECKPOINT}"
    saved = load_checkpoint(run_dir / CHECKPOINT, expected_fingerprint=config.decisive())
    standing = Standing.read(saved.meta, rounds=config.rounds, place=place)
    facts, then = read_facts(run_dir), Identity.read(standing.identity)
    if facts is None or standing.run != facts["id"] or then is None:
        raise ValueError(f"{place} belongs to another run than {run_dir}; restore the run's own checkpoint")
    then.require_same_sources(Identity.of(config), str(run_dir), config)
    config = replace(config, ranks=1)
    with open_ranks(1, pick_device(config)) as ranks:
        world = build_world(config, ranks, observer, train_warmup=warm)
        tensors = {key: tensor for key, tensor in saved.tensors.items() if not key.startswith(PREFIX)}
        StateCheck.of(world, place).require(tensors, standing.round)
        state = unpack_state(tensors, round=standing.round, device=ranks.device)
        yield Opened(run, world, state, standing, saved.versions)


def refuse_client(config: Config, client: int | None) -> None:
    """Refuse a client that the run does not have, and a global model where the system has none.

    Raises:
        ValueError: one sentence.
    """
    if client is None and not algorithm_class(config.algorithm).has_global_model:
        raise ValueError(
            f"algorithm={config.algorithm!r} has no global model, since each client keeps a gate of its own; "
            "export one with --client NUMBER"
        )
    if client is not None and not 0 <= client < config.clients:
        raise ValueError(f"client {client} is not in this run; it has clients 0 to {config.clients - 1}")


def own_plan(opened: Opened, client: int) -> ExpertPlan:
    """Return the plan of the model that the report judges as this client's own."""
    return opened.world.algorithm.personal(opened.state, client)


def loss_now(opened: Opened, plan: ExpertPlan | None) -> float:
    """Judge the global model, or the own model that a plan makes, as the report does; nats."""
    if plan is None:
        loss = evaluate_global(opened.world, opened.state).loss
        assert loss is not None  # refuse_client
        return loss
    (found,) = own_models(opened.world, opened.state, [plan])
    return found.loss_sum / max(found.count, 1)


def require_judged(opened: Opened, client: int | None, loss: float) -> None:
    """Refuse a model that is not the one on record; where none is on record, there is nothing to compare.

    Raises:
        ValueError: the loss differs from that of the records by more than ``SAME``.
    """
    recorded = opened.recorded(client)
    if recorded is None or abs(loss - recorded) <= SAME * abs(recorded):
        return
    what = "the global model" if client is None else f"client {client}'s own model"
    raise ValueError(
        f"{what} has a held-out loss of {loss:.6g} here, and {opened.run.path} has {recorded:.6g} on record; export "
        "with the fedmoe and torch that trained it, on its machine"
    )


def equal_experts(plan: ExpertPlan, scores_LE: np.ndarray) -> ExpertPlan:
    """Return a plan with as many experts in every layer, and not more in all: the mean number, rounded down.

    A layer with more loses those of the lowest score, a layer with fewer gets the best that it does not hold. Experts
    of all layers are of one size, so memory and count stay inside the budget that the plan had.

    Args:
        plan: without experts that others serve.
        scores_LE: what the run last knew of this client's experts; larger is more important.

    Raises:
        ValueError: absent experts are served by others, so they cannot be counted alone.

    Example:
        >>> from fedmoe_core.budget.limits import Budget, Cost
        >>> held = np.array([[True, True, True], [False, True, False]])
        >>> work = dict(client=0, round=0, top_k=2, local_steps=1, seed=0, budget=Budget(), predicted=Cost())
        >>> plan = ExpertPlan(permitted_LE=held, trainable_LE=held, **work)
        >>> equal_experts(plan, np.array([[3.0, 1.0, 2.0], [1.0, 0.0, 2.0]])).permitted_LE.tolist()
        [[True, False, True], [False, True, True]]
    """
    if plan.extras.alias_LE is not None:
        raise ValueError(
            f"client {plan.client}: absent experts are served by merged ones, which --equal-experts cannot drop; "
            "export it without"
        )
    held_LE = plan.permitted_LE
    count = int(held_LE.sum()) // len(held_LE)
    kept_LE = np.zeros_like(held_LE)
    for layer, (held_E, score_E) in enumerate(zip(held_LE, scores_LE, strict=True)):
        best = np.lexsort((-score_E, ~held_E))[:count]  # the held ones first
        kept_LE[layer, best] = True
    rows = {
        key: {
            e: row
            for e, row in own.items()
            if TensorKey.parse(key).name in STEERING or kept_LE[int(TensorKey.parse(key).layer), e]
        }
        for key, own in plan.extras.rows.items()
    }
    extras = replace(plan.extras, rows=rows, per_batch=None)
    top_k = min(plan.top_k, count)
    return replace(plan, permitted_LE=kept_LE, trainable_LE=kept_LE & plan.trainable_LE, top_k=top_k, extras=extras)
