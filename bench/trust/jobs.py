"""The runs that are attacked: a plain model whose run takes a tenth of a second, and a small mixture of experts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedmoe_core.config.run_config import Config
from fedmoe_core.data.rows import Rows
from fedmoe_core.model.plain import plain
from fedmoe_core.simulation import run as simulate
from fedmoe_core.simulation.directory.log import LEDGER, METRICS
from fedmoe_core.simulation.observer import NullObserver

TIMED = ("seconds", "engine_seconds", "evaluate_seconds")  # what a second run cannot repeat


def network() -> nn.Module:
    """Make two layers."""
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def cross_entropy(model: nn.Module, rows: Rows) -> Tensor:
    """Return the mean cross entropy of a batch."""
    return functional.cross_entropy(model(rows[0]), rows[1])


def sgd(parameters: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
    """Make plain SGD."""
    return torch.optim.SGD(parameters, lr)


def _points(rows: int, seed: int) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (rows,), generator=generator)
    return torch.eye(3, 5)[labels] * 3 + torch.randn(rows, 5, generator=generator), labels


adapter = plain(network, cross_entropy, train=_points(90, 0), test=_points(40, 1), optimizer_fn=sgd)


@dataclass(frozen=True)
class Job:
    """One kind of run.

    Attributes:
        name: of it, in tables.
        words: of its configuration, without ``out`` and ``cache``.
        rounds: it has.
    """

    name: str
    words: tuple[str, ...]
    rounds: int = 4

    def config(self, out: Path, *words: str) -> Config:
        """Return the configuration of a run in ``out``; the cache lies beside it."""
        own = [f"rounds={self.rounds}", f"out={out}", f"cache={out.parent / 'cache'}"]
        return Config.load(overrides=[*self.words, *own, *words])

    def run(self, out: Path, *words: str, force: bool = False) -> None:
        """Run it from its start to its end."""
        simulate.run(self.config(out, *words), observer=NullObserver(), force=force)


PLAIN = Job(
    "plain",
    (f"adapter={__name__}:adapter", "clients=4", "threads=1", "train.batch_size=6", "train.local_steps=3"),
)
SIZES = ("hidden_size=32", "layers=2", "heads=2", "kv_heads=1", "head_dim=16", "experts=4", "expert_width=16")
MOE = Job(
    "mixture",
    (
        *("algorithm=hfedmoe_plus", "data=stdlib", "clients=3", "threads=1", "budgets=experts=50%;experts=100%"),
        *(f"model_config.{size}" for size in (*SIZES, "vocab_size=320")),
        *("warmup.steps=2", "warmup.batch_size=2", "warmup.seq_len=16"),
        *("train.batch_size=2", "train.seq_len=16", "train.local_steps=2", "eval.sequences=2"),
    ),
    rounds=3,
)


@dataclass(frozen=True)
class Ending:
    """What a run came to, timings left out; two runs of one job have equal endings.

    Attributes:
        model_hash: of the final model.
        lines: of both logs.
        files: names in the run directory and in its checkpoint, the lock and the tensor file's digest aside.
    """

    model_hash: str
    lines: tuple[str, ...]
    files: tuple[str, ...]

    @classmethod
    def of(cls, out: Path) -> Ending:
        """Read that of a finished run."""
        summary = json.loads((out / "summary.json").read_text())
        names = {path.name.split("-")[0] if path.suffix == ".safetensors" else path.name for path in out.rglob("*")}
        return cls(summary["model_hash"], lines_of(out), tuple(sorted(names - {"fedmoe-run.lock"})))


def lines_of(out: Path) -> tuple[str, ...]:
    """Return the lines of both logs without what a clock measured."""
    raw = [line for name in (METRICS, LEDGER) for line in (out / name).read_text().splitlines()]
    return tuple(json.dumps(_untimed(json.loads(line)), sort_keys=True) for line in raw)


def _untimed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _untimed(item) for key, item in value.items() if key not in TIMED}
    return [_untimed(item) for item in value] if isinstance(value, list) else value


class _Stop(NullObserver):
    def __init__(self, round: int) -> None:
        self.stop = round

    def on_round(self, round: int, rounds: int, record: object) -> None:
        if round == self.stop:
            raise KeyboardInterrupt


def stop_after(job: Job, out: Path, whole: Path, *, round: int, seed: int = 0) -> None:
    """Stop a run as a kill between the logs and the checkpoint of the next round would.

    Args:
        job: what runs.
        out: where.
        whole: an equal run that ended, whose lines of the next round are taken; the last of them is cut.
        round: the last that is on record.
        seed: of the run; with another one than that of ``whole`` it is only stopped.
    """
    with suppress(KeyboardInterrupt):
        simulate.run(job.config(out, f"seed={seed}"), observer=_Stop(round))
    if not seed:
        for name in (METRICS, LEDGER):
            more = [line for line in (whole / name).read_text().splitlines() if json.loads(line)["round"] == round + 1]
            with (out / name).open("a") as file:
                file.write("\n".join(more[:2])[:-3])


def fresh_copy(run: Path, to: Path) -> None:
    """Copy a run over what lies in ``to``, whatever that is."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(run, to)
