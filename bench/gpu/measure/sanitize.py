"""The part `sanitize`: a small case of every kernel under compute-sanitizer, for stray accesses and for races.

The case runs in a separate process, once without the tool (so that Triton's compilation is done and cached) and then
under each tool. torch's caching allocator is off: else a stray access lands in memory that torch holds anyway.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.common import checkout
from bench.gpu.measure.correct import Check
from bench.gpu.measure.store import Record

TOOLS = ("memcheck", "racecheck")
SECONDS = 165  # a tool; two of them and the run without must stay under nine minutes
_ERROR = 99
# One check of each kernel, the four that a short session has time for first: both storages, biases, a place without
# a row, adapters, codes, the routing rules, a cohort.
CASES = (
    "bfloat16: a quarter trainable",
    "bfloat16: swiglu_oai with biases",
    "bfloat16: rows that no descriptor can address",
    "bfloat16: adapters over shared bases",
    "bfloat16: places without a row",
    "bfloat16: one choice a token",
    "bfloat16: frozen experts as fp8_e4m3",
    "bfloat16: frozen experts as nvfp4",
    "bfloat16: frozen experts as nf4, decoded first",
    "bfloat16: importance sums",
    "route: sigmoid with bias and groups",
    "route: a cohort",
    "bfloat16: clients of a cohort get the bits each gets alone, tiles by default",
)


def run_case(checks: Mapping[str, Check], count: int) -> None:
    """Run what the tools watch: the first `count` checks of `CASES`, at tiny sizes; 0 = all."""
    for name in CASES[: count or None]:
        print(f"{name}: {checks[name]()}", flush=True)


def tool() -> str | None:
    """Find compute-sanitizer; None = not installed."""
    found = shutil.which("compute-sanitizer")
    beside = Path("/usr/local/cuda/bin/compute-sanitizer")
    return found or (str(beside) if beside.exists() else None)


def results(device: str, tools: Sequence[str] = TOOLS, count: int = 0, seconds: float = SECONDS) -> list[Record]:
    """Make a record for each tool: passed, failed with what it said last, or skipped with the reason.

    Args:
        device: "cuda", or "cpu", where every tool is skipped.
        tools: names of `TOOLS`.
        count: how many of `CASES` are watched, 0 = all, which first run without a tool.
        seconds: for the run without a tool, and for each tool.
    """
    program = tool()
    missing = None
    if device != "cuda":
        missing = "compute-sanitizer watches CUDA kernels, and this is a CPU"
    elif program is None:
        missing = "compute-sanitizer is not installed (neither on the PATH nor in /usr/local/cuda/bin)"
    if missing is not None or program is None:
        return [_record(name, "skipped", missing or "") for name in tools]
    target = checkout.command("bench.gpu.run", "sanitized", "--device", device, "--tiny")
    target += ["--count", str(count)]
    if not count:  # a few checks have run by themselves just before, and their kernels are in the cache
        code, said = run(target, seconds)
        if code is None:
            late = f"the case takes longer than {seconds:.0f} s without the tool"
            return [_record(name, "skipped", late) for name in tools]
        if code:
            return [_record(name, "failed", f"the case fails without the tool: {_end(said)}") for name in tools]
    found = []
    for name in tools:
        command = [program, "--tool", name, "--error-exitcode", str(_ERROR), "--print-limit", "20", *target]
        code, said = run(command, seconds)
        if code is None:
            found.append(_record(name, "skipped", f"it took longer than {seconds:.0f} s"))
            continue
        refused = code not in (0, _ERROR) and "ERROR SUMMARY" not in said
        status = "passed" if code == 0 else "skipped" if refused else "failed"
        found.append(_record(name, status, f"the tool could not run: {_end(said)}" if refused else _end(said)))
    return found


def run(command: Sequence[str], seconds: float) -> tuple[int | None, str]:
    """Run a command with all it starts in a process group of its own; its code, None = ended for being late, and words.

    A tool that is killed alone leaves what it watched on the GPU. The group stays in the caller's POSIX session, so
    that what ends the caller's processes ends them too.
    """
    environment = checkout.environment(PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment}
    process = subprocess.Popen(list(command), process_group=0, **streams)
    try:
        said, _ = process.communicate(timeout=seconds)
        return process.returncode, said
    except subprocess.TimeoutExpired:
        return None, ""
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _end(said: str) -> str:
    """Return the tool's own summary if there is one, else the last lines."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    summary = [line for line in lines if "SUMMARY" in line]
    return " | ".join((summary or lines)[-6:])[:600]


def _record(name: str, status: str, detail: str) -> Record:
    return {"name": f"compute-sanitizer {name}", "part": "sanitize", "status": status, "detail": detail}
