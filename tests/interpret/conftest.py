"""Tests in Triton's interpreter: collected only under TRITON_INTERPRET=1, with memory poisoned and seeds fixed."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Whether kernels are interpreted is settled when triton is imported, so these tests have a process of their own.
collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["*"]


@pytest.fixture(autouse=True, scope="session")
def interpreter_patched() -> None:
    """See `patched_once.py`."""
    import patched_once

    patched_once.install()


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """torch.empty and its like hold NaN, or the largest integer, so that what a kernel forgets to write is loud."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(2).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line a file: cases passed and failed, and how long they took."""
    seconds: Counter[str] = Counter()
    counts: dict[str, Counter[str]] = {"passed": Counter(), "failed": Counter()}
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            if "interpret" in Path(report.fspath).parts:
                counts["passed" if outcome == "passed" else "failed"][report.fspath] += 1
                seconds[report.fspath] += report.duration
    if seconds:
        terminalreporter.write_line(f"{'in the interpreter, against float64':50} {'passed':>7} {'failed':>7} {'s':>6}")
    for path in sorted(seconds):
        passed, failed = (counts[key][path] for key in ("passed", "failed"))
        terminalreporter.write_line(f"{Path(path).name:50} {passed:7} {failed:7} {seconds[path]:6.1f}")
