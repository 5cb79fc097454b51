"""A long run needs no more memory than a short one, and its files grow by the same bytes every round."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from tiny_runs import TINY, write_notes

LINUX = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from Linux's /proc")
SETTLED, COUNTED = 60, 200  # rounds until allocators and caches are full, and rounds that are then looked at
BLOCK = 25  # rounds

WATCHING = """
import gc, json, os, sys
from pathlib import Path
from fedmoe_core import Config, simulate
from fedmoe_core.simulation.observer import Observer

words, told = json.loads(sys.argv[1]), Path(sys.argv[2])
out, seen = Path(words[-1].partition("=")[2]), []

class Watch(Observer):
    def on_round(self, round, rounds, record):
        if round == 0:
            return  # its checkpoint comes after this
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        sizes = [(out / name).stat().st_size for name in ("metrics.jsonl", "ledger.jsonl")]
        checkpoint = sum(file.stat().st_size for file in (out / "checkpoint").iterdir())
        seen.append([pages * os.sysconf("SC_PAGE_SIZE"), *sizes, checkpoint])

simulate.run(Config.load(overrides=words), observer=Watch())
told.write_text(json.dumps(seen))
"""


def growth(rss: Sequence[int]) -> float:
    """Bytes a round: the median step between the medians of blocks of rounds.

    A leak shows in every block. Once in some runs one step of 184 kB came, such as a library that is loaded late.
    """
    medians = [statistics.median(rss[start : start + BLOCK]) for start in range(0, len(rss), BLOCK)]
    return statistics.median(after - before for before, after in pairwise(medians)) / BLOCK


def test_the_measure_sees_a_leak_and_passes_over_a_step() -> None:
    pages = [500_000_000 + 4096 * (number // 4) for number in range(COUNTED)]  # a page every fourth round
    assert growth(pages) == pytest.approx(1024, rel=0.05)
    assert growth([500_000_000 + 184_000 * (number > 90) for number in range(COUNTED)]) == 0


@LINUX
def test_memory_and_the_bytes_of_a_round_stay_the_same_over_200_rounds(tmp_path: Path) -> None:
    words = [
        *TINY,
        *("clients=6", "clients_per_round=1", f"rounds={SETTLED + COUNTED}", "partition=iid", "eval.every=10000"),
        *("model_config.layers=1", "model_config.experts=2", "budgets=experts=100%", "train.local_steps=1"),
        f"data=jsonl:{write_notes(tmp_path / 'notes.jsonl')}",
        f"cache={tmp_path / 'cache'}",
        f"out={tmp_path / 'run'}",
    ]
    told, paths = tmp_path / "told.json", os.pathsep.join(path for path in sys.path if path)
    # One arena: with several, which thread frees what decides how much memory lies between blocks.
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    subprocess.run([sys.executable, "-c", WATCHING, json.dumps(words), str(told)], env=env, check=True, timeout=900)
    rss, metrics, ledger, checkpoint = zip(*json.loads(told.read_text())[SETTLED:], strict=True)
    assert len(rss) == COUNTED
    assert growth(rss) < 1000
    quarter = COUNTED // 4
    for sizes in (metrics, ledger):
        steps = [after - before for before, after in pairwise(sizes)]
        assert statistics.median(steps[-quarter:]) < 1.1 * statistics.median(steps[:quarter])
    assert max(checkpoint) - min(checkpoint) < 200  # digits of its JSON
