"""HFedMoE+ and the simple rivals: what each chooses, what it leaves alone, and that budgets hold in whole runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hand_made import model, population, profiles
from tiny_corpus import make_config

from fedmoe_core import simulate
from fedmoe_core.algorithms import find_algorithm
from fedmoe_core.config import Config
from fedmoe_core.names import ALGORITHMS
from fedmoe_core.state import ServerState, initial_state

Make = Callable[..., Config]
NEW = ("hfedmoe_plus", "fedavg_smallest", "most_activated")
TIERS = "budgets=experts=25%;experts=50%;experts=100%;memory=400KiB".replace(";", ",")


@pytest.fixture
def config(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    return make_config(tmp_path, tmp_path_factory.getbasetemp() / "plus")


def heard() -> ServerState:
    return replace(initial_state(model(), 3), profiles=tuple(profiles()))


def final(config: Config) -> dict[str, Any]:
    simulate.run(config)
    out = Path(config.out)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {"summary": json.loads((out / "summary.json").read_text()), "lines": lines}


def hash_of(run: dict[str, Any]) -> list[str]:
    return [line["model_sha256"] for line in run["lines"] if line["type"] == "round"]


@pytest.mark.parametrize("name", NEW)
def test_names_are_registered_with_a_card(name: str) -> None:
    assert name in ALGORITHMS
    assert find_algorithm(name, population()).card.name == name
