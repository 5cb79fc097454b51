"""Tests in Triton's interpreter: collected only under TRITON_INTERPRET=1, with memory poisoned and seeds fixed."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# Whether kernels are interpreted is settled when triton is imported, so these tests have a process of their own.
collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))  # expert_cases.py


@pytest.fixture(autouse=True, scope="session")
def patched_once() -> Iterator[None]:
    """Spare the interpreter a third of its time, which it spends on replacing what it has replaced before.

    Triton 3.7 replaces the functions of `triton.language` when a kernel starts, and at every call of a device function
    inside of it looks at all members of the modules again. The second look is left out where it would find nothing.
    """
    from triton import language
    from triton.runtime import interpreter

    patch, scope = getattr(interpreter, "_patch_lang", None), getattr(interpreter, "_LangPatchScope", None)
    if patch is None or scope is None:  # another version of triton, which may go about it in another way
        yield
        return
    seen: dict[Any, list[Any]] = {}  # by function, the modules that it sees as the language
    modules = (language, language.core)

    def once(fn: Any) -> Any:
        if fn not in seen:
            seen[fn] = [value for value in fn.__globals__.values() if any(value is module for module in modules)]
        functions = (language.tensor.__add__, *(module.arange for module in seen[fn]))
        return patch(fn) if any(language.core.is_builtin(function) for function in functions) else scope()

    interpreter._patch_lang = once
    yield
    interpreter._patch_lang = patch


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
