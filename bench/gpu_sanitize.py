"""The part `sanitize`: a small case of every kernel under compute-sanitizer, for stray accesses and for races.

The case runs in a separate process, once without the tool (so that Triton's compilation is done and cached) and then
under each tool. torch's caching allocator is off: else a stray access lands in memory that torch holds anyway.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from gpu_correct import Check
from gpu_store import Record

TOOLS = ("memcheck", "racecheck")
SECONDS = 165  # a tool; two of them and the run without must stay under nine minutes
_ERROR = 99
# One check of each kernel: both storages, biases, a place without a row, adapters, codes, the routing rules, a cohort.
_CASE = (
    "bfloat16: a quarter trainable",
    "bfloat16: swiglu_oai with biases",
    "bfloat16: places without a row",
    "bfloat16: one choice a token",
    "bfloat16: rows that no descriptor can address",
    "bfloat16: adapters over shared bases",
    "bfloat16: frozen experts in 8 bits",
    "bfloat16: frozen experts in 4 bits",
    "bfloat16: importance sums",
    "route: sigmoid with bias and groups",
    "route: a cohort",
    "bfloat16: clients of a cohort get the bits each gets alone, tiles by default",
)


def run_case(checks: Mapping[str, Check]) -> None:
    """Run what the tools watch: the checks of `_CASE`, at tiny sizes."""
    for name in _CASE:
        print(f"{name}: {checks[name]()}", flush=True)


def tool() -> str | None:
    """Find compute-sanitizer; None = not installed."""
    found = shutil.which("compute-sanitizer")
    beside = Path("/usr/local/cuda/bin/compute-sanitizer")
    return found or (str(beside) if beside.exists() else None)


def results(device: str) -> list[Record]:
    """Make a record for each tool: passed, failed with what it said last, or skipped with the reason."""
    program = tool()
    missing = None
    if device != "cuda":
        missing = "compute-sanitizer watches CUDA kernels, and this is a CPU"
    elif program is None:
        missing = "compute-sanitizer is not installed (neither on the PATH nor in /usr/local/cuda/bin)"
    if missing is not None or program is None:
        return [_record(name, "skipped", missing or "") for name in TOOLS]
    plain = _run([], device)
    if plain.returncode:
        return [_record(name, "failed", f"the case fails without the tool: {_end(plain)}") for name in TOOLS]
    found = []
    for name in TOOLS:
        command = [program, "--tool", name, "--error-exitcode", str(_ERROR), "--print-limit", "20"]
        try:
            done = _run(command, device)
        except subprocess.TimeoutExpired:
            found.append(_record(name, "skipped", f"it took longer than {SECONDS} s"))
            continue
        refused = done.returncode not in (0, _ERROR) and "ERROR SUMMARY" not in done.stdout
        status = "passed" if done.returncode == 0 else "skipped" if refused else "failed"
        found.append(_record(name, status, f"the tool could not run: {_end(done)}" if refused else _end(done)))
    return found


def _run(prefix: list[str], device: str) -> subprocess.CompletedProcess[str]:
    script = Path(__file__).with_name("gpu.py")
    command = [*prefix, sys.executable, str(script), "sanitized", "--device", device, "--tiny"]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environment)


def _end(done: subprocess.CompletedProcess[str]) -> str:
    """Return the tool's own summary if there is one, else the last lines."""
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    summary = [line for line in lines if "SUMMARY" in line]
    return " | ".join((summary or lines)[-6:])[:600]


def _record(name: str, status: str, detail: str) -> Record:
    return {"name": f"compute-sanitizer {name}", "part": "sanitize", "status": status, "detail": detail}
