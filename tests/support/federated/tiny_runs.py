"""A corpus, a model and a command line small enough that a whole run takes seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from typer.testing import CliRunner

from fedmoe_core.cli import main

HOUSE = Path(__file__).parents[3]
TINY = (
    "clients=4",
    "rounds=1",
    "threads=1",
    "model_config.hidden_size=32",
    "model_config.heads=2",
    "model_config.kv_heads=1",
    "model_config.head_dim=16",
    "model_config.experts=8",
    "model_config.expert_width=16",
    "model_config.vocab_size=320",
    "warmup.steps=2",
    "warmup.batch_size=4",
    "warmup.seq_len=32",
    "train.batch_size=2",
    "train.seq_len=32",
    "train.local_steps=2",
    "eval.sequences=2",
)


def write_notes(path: Path, *, owners: str = "wxyz", lines: int = 40) -> Path:
    """JSON Lines: ``lines`` texts of each owner, in words of the owner's own."""
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for owner in owners:
            words = [f"{owner}{''.join(rng.choice(list('aeioukrst'), 4))}" for _ in range(60)]
            for _ in range(lines):
                file.write(json.dumps({"text": " ".join(rng.choice(words, 60)), "client": f"owner-{owner}"}) + "\n")
    return path


def fedmoe(*words: str | Path, prefix: tuple[str, ...] = ("-m", "fedmoe_core.cli")) -> subprocess.CompletedProcess[str]:
    """The real command in a process of its own, on this checkout's packages, outside any launcher."""
    paths = [str(HOUSE), str(HOUSE / "kernels"), str(HOUSE / "bindings"), os.environ.get("PYTHONPATH", "")]
    outer = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment = {**outer, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, *prefix, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def fedmoe_here(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """The same command inside of this process, which has paid 3 s for torch and transformers already.

    For what the command says and leaves behind; what a library prints past Python, and what only a new process shows,
    needs ``fedmoe``.
    """
    unlaunched = dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    result = CliRunner().invoke(main.app, [*map(str, words)], prog_name="fedmoe", env={**unlaunched, "COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception  # the real command would end in a traceback
    return subprocess.CompletedProcess([*words], result.exit_code, result.stdout, result.stderr)
