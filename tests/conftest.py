"""What all tests share: one thread for each process, a home that goes with the session, and the longest tests first."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Before torch loads, here and in every process that a test starts: the workers of pytest-xdist fill the cores, and
# threads that wait for a core spin.
os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
# How long a drawn example takes is not what a test is about, and failed ones are printed, not kept in the checkout.
settings.register_profile("house", deadline=None, database=None)
settings.load_profile("house")
# Files with the longest single tests, and then the many of some seconds. They start first, so that no worker is left
# with one of them at the end.
LONGEST = (
    *("test_rungs.py", "test_jobs.py", "test_no_network.py", "test_framework.py", "test_run.py"),
    *("test_aot.py", "test_stand_in.py", "test_machine_code.py"),
)


def pytest_configure(config: pytest.Config) -> None:
    """Keep the caches of fedmoe, triton, matplotlib and the model hub out of the user's home."""
    if hasattr(config, "workerinput"):  # a worker of pytest-xdist inherits the environment of its controller
        return
    home = tempfile.TemporaryDirectory(prefix="fedmoe-tests-")
    config.add_cleanup(home.cleanup)
    names = {"HOME": ".", "XDG_CACHE_HOME": ".cache", "XDG_CONFIG_HOME": ".config", "HF_HOME": "hub"}
    names |= {"MPLCONFIGDIR": "matplotlib", "TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
    names |= {"HYPOTHESIS_STORAGE_DIRECTORY": "hypothesis"}
    os.environ |= {name: str(Path(home.name) / folder) for name, folder in names.items()}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest tests first; the others stay in their order."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """torch.compile has compiled nothing before the test, and keeps nothing of it."""
    import torch

    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> None:
    """What bench compiles has the static tiles, and stays in the session's cache, for all that compile."""
    monkeypatch.delenv("FEDMOE_TILES", raising=False)
