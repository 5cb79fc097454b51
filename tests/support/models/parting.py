"""Two ranks that meet and part, for tests/core/simulation/ranks/test_parting.py: WHAT and the words of a run."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from fedmoe_core.config.run_config import Config
from fedmoe_core.simulation import launch
from fedmoe_core.simulation import run as simulate
from fedmoe_core.simulation.observer import NullObserver
from fedmoe_core.simulation.process_group import open_ranks


def threads_of_gloo() -> int:
    """Count those of this process, by the names that Linux shows."""
    return sum("gloo" in (task / "comm").read_text() for task in Path("/proc/self/task").iterdir())


class Counting(NullObserver):
    """Counts them after each round."""

    def __init__(self) -> None:
        self.during = 0

    def on_round(self, round: int, rounds: int, record: Any) -> None:
        self.during = threads_of_gloo()


def whole_run(words: list[str]) -> tuple[int, int]:
    """A run to its end, which imports whatever a run imports."""
    observer = Counting()
    simulate.run(Config.load(overrides=words), observer=observer)
    return observer.during, threads_of_gloo()


def lost_peer(words: list[str]) -> tuple[int, int]:
    """Rank 1 goes without a word; rank 0 counts while it still holds the error."""
    during = 0
    try:
        with open_ranks(2, torch.device("cpu")) as ranks:
            if not ranks.leads:
                os._exit(0)
            during = threads_of_gloo()
            ranks.gather("here")
    except launch.PeerLostError:
        return during, threads_of_gloo()
    raise AssertionError("rank 1 answered")


if __name__ == "__main__":
    what, *words = sys.argv[1:]
    if launch.launched():
        found = {f.__name__: f for f in (whole_run, lost_peer)}[what](words)
        if launch.rank() == 0:
            print(*found, flush=True)
    else:
        launch.run_ranks(sys.argv[1:], ranks=2, threads=1, program=(__file__,))
