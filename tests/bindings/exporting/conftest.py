"""Runs that the tests of this folder export, each played once by a process."""

from __future__ import annotations

from pathlib import Path

import pytest
from exported_runs import BUDGETS, SYSTEMS, WORDS, Ran
from tiny_corpus import make_config

from fedmoe_core.simulation import run as simulate
from fedmoe_core.simulation.observer import NullObserver


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Runs by name, each played once."""
    make, played = make_config(tmp_path_factory.mktemp("runs"), tmp_path_factory.getbasetemp() / "shared"), {}

    def ran(name: str, *words: str) -> Ran:
        key = (name, *words)
        if key not in played:
            system = SYSTEMS.get(name, ())
            named = () if any(word.startswith("algorithm=") for word in system) else (f"algorithm={name}",)
            config = make(*WORDS, BUDGETS, *named, *system, *words, out_name=f"{name}-{len(played)}").resolved()
            simulate.run(config, observer=NullObserver())
            played[key] = Ran(config, Path(config.out))
        return played[key]

    return ran
