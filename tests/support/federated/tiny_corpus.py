"""Small corpora and the smallest configurations that still train, for whole runs inside one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fedmoe_core.config.run_config import Config

SIZES = (
    "threads=1",
    "model_config.hidden_size=32",
    "model_config.heads=2",
    "model_config.kv_heads=1",
    "model_config.head_dim=16",
    "model_config.experts=8",
    "model_config.expert_width=16",
    "model_config.vocab_size=320",
    "warmup.steps=5",
    "warmup.batch_size=4",
    "warmup.seq_len=32",
    "train.batch_size=2",
    "train.seq_len=32",
    "train.local_steps=3",
    "eval.sequences=2",
)


def write_text(path: Path) -> Path:
    """Four owners with words of their own, so that clients differ."""
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for owner in "wxyz":
            words = [f"{owner}{''.join(rng.choice(list('aeioukrst'), 4))}" for _ in range(60)]
            for _ in range(40):
                file.write(json.dumps({"text": " ".join(rng.choice(words, 60)), "client": f"owner-{owner}"}) + "\n")
    return path


def write_topics(path: Path) -> Path:
    """300 rows of three classes, each with words of its own."""
    rng = np.random.default_rng(0)
    words = [[f"{topic}{n}" for n in range(30)] for topic in ("sun", "sea", "ice")]
    rows = [f"{n % 3},{' '.join(rng.choice(words[n % 3], rng.integers(10, 40)))}\n" for n in range(300)]
    path.write_text("label,text\n" + "".join(rows))
    return path


def make_config(out: Path, shared: Path) -> Callable[..., Config]:
    """Configurations of two rounds over four clients' text, or with ``labelled`` over three clients' topics.

    Args:
        out: parent of the run directories.
        shared: where the corpora and the cached warm-ups of a test session lie.
    """
    shared.mkdir(parents=True, exist_ok=True)
    text, topics = shared / "notes.jsonl", shared / "topics.csv"
    for path, write in ((text, write_text), (topics, write_topics)):
        if not path.exists():
            write(path)

    def make(*overrides: str, out_name: str = "run", labeled: bool = False) -> Config:
        data = f"csv:{topics}" if labeled else f"jsonl:{text}"
        where = [f"data={data}", f"out={out / out_name}", f"cache={shared / 'cache'}"]
        task = ["clients=3", "warmup.head_steps=5"] if labeled else ["clients=4"]
        return Config.load(None, [*SIZES, "rounds=2", *task, *where, *overrides])

    return make
