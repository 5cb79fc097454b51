"""Small runs under a virtual clock: their configuration, what they return and the lines that they leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny_runs import TINY

from fedmoe_core.base.files import read_json_lines
from fedmoe_core.config.run_config import Config
from fedmoe_core.simulation import run as simulate
from fedmoe_core.simulation.observer import NullObserver

SLOW = "speed=1e7,downlink=100kbit,uplink=100kbit"


def clocked(corpus: Path, out: Path, *words: str) -> Config:
    """A run on a corpus beside which its cache lies; ``words`` state the budgets."""
    return Config.load(None, [*TINY, f"data=jsonl:{corpus}", f"out={out}", f"cache={corpus.parent / 'cache'}", *words])


def run(config: Config) -> dict[str, Any]:
    return simulate.run(config, observer=NullObserver())


def lines(config: Config, name: str = "metrics.jsonl", kind: str | None = None) -> list[dict[str, Any]]:
    found = [line for _, line in read_json_lines(Path(config.out) / name, json.loads)]
    return [line for line in found if kind is None or line["type"] == kind]
