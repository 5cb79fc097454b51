"""Parts of a short GPU session: facts and ceilings, routing and models, tiles of the hottest kernels, counters."""

from __future__ import annotations

import argparse
import csv
import io
import os
import platform
import re
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from bench.common import checkout, machine
from bench.gpu import summary
from bench.gpu.invocation import Run
from bench.gpu.measure import model as gpu_model
from bench.gpu.measure import routing as gpu_routing
from bench.gpu.measure.sanitize import run as run_apart
from bench.gpu.measure.store import Record, sentence
from bench.gpu.plan import RUN
from fedmoe_kernels.backends import can_run_triton
from fedmoe_kernels.tiles.lookup import arch_of

PROFILED = ("_data_gradient_kernel", "_weight_gradient_kernel")
SECTIONS = ("SpeedOfLight", "Occupancy", "WarpStateStats", "MemoryWorkloadAnalysis", "LaunchStats")
LOUD = ("Duration", "Memory Throughput", "Compute (SM) Throughput", "L2 Hit Rate", "Achieved Occupancy")


def facts(run: Run, until: float) -> int:
    """Print and keep what the machine is and what it reaches: versions, tools, clocks, a product and a copy."""
    about = run.store.about
    for name in ("gpu", "driver", "cuda", "torch", "triton", "transformers", "python", "commit", "kernels", "harness"):
        print(f"{name}: {about[name]}")
    print(f"kernel: {platform.release()}, {os.cpu_count()} cores")
    for tool in ("gcc", "compute-sanitizer", "ncu", "nvcc"):
        print(f"{tool}: {shutil.which(tool) or 'not on the PATH'}")
    print(f"SM clock, memory clock, power, temperature: {machine.clocks()}")
    run.store.save()
    ceilings(run)
    for name, value in run.store.data["ceilings"].items():
        print(f"reached, {name}: {value:.4g}", flush=True)
    return 0


def ceilings(run: Run) -> None:
    """Measure what this machine reaches, once."""
    if not run.store.data["ceilings"]:
        run.store.data["ceilings"] = machine.ceilings(run.options.device, tiny=run.options.tiny)
        run.store.save()


def routing(run: Run, until: float) -> int:
    """Time routing alone against torch's operations; red where the two disagree."""
    wrong, plan = False, run.plan()
    for router in gpu_routing.TINY if run.options.tiny else gpu_routing.ROUTERS:
        if time.monotonic() > until:
            return run.again("routing")
        wrong |= not gpu_routing.measure(router, plan.device, run.backend, plan.rounds, run.store)
    print("\n".join(summary.routing(run.store.find("routing"))), flush=True)
    return int(wrong)


def model(run: Run, until: float) -> int:
    """Time a model of transformers with its own experts and with fedmoe's; red where the two disagree."""
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        print(f"skipped: {error}")
        return 0
    chosen, plan = gpu_model.TINY if run.options.tiny else gpu_model.REAL, run.plan()
    agree: bool | None = False
    try:
        agree = gpu_model.measure(chosen, plan.device, plan.dtype, plan.rounds, run.store, until)
    except Exception as error:  # it would fail again, and the part would begin again three times
        run.store.add("left_out", [{"peer": "the whole model", "status": "failed", "reason": sentence(error)}])
        print(f"failed: {sentence(error)}")
    print("\n".join(summary.models(run.store.find("models"))), flush=True)
    return run.again("model") if agree is None else int(not agree)


def tune(run: Run, until: float) -> int:
    """Search tiles of the families that are asked for, at the first shape's rows; each winner is written at once."""
    device = run.options.device
    reason = can_run_triton(torch.device(device))
    if reason is not None:
        print(f"skipped: {reason}")
        return 0
    from bench.tune import run as tuner  # needs triton

    shape, out = run.shapes[0], run.store.path.with_name("tiles.json")
    rows = max(1, shape.T * shape.K // shape.E)
    families = tuple(run.options.families.split(",")) if run.options.families else tuner.FAMILIES
    done = {found["family"] for found in run.store.find("tuned")}
    left = tuple(name for name in families if name not in done)
    kinds: dict[str, Any] = {"arch": arch_of(device), "dtype": run.plan().dtype, "device": device, "repeats": 7}
    with tuner.compilers(device) as pool:
        for family in left:
            if time.monotonic() > until:
                return run.again("tune")
            how = {"families": (family,), "most": tuner.MOST, "walks": run.options.walks, "until": until}
            search = tuner.Search(pool=None if device == "cpu" else pool, **kinds, **how)
            for line in search.lines(shape, rows):
                merged = tuner.with_families(out, line, (family,))
                tuner.keep(out, run.store.about, [merged])
                record = {"family": family, "shape": shape.name, "rows": rows, "ms": line["ms"], "tile": line[family]}
                run.store.add("tuned", [record])
    return 0


def find_ncu() -> str | None:
    """Find the GPU's profiler; None = not installed."""
    usual = [Path("/usr/local/cuda/bin/ncu"), *sorted(Path("/opt/nvidia/nsight-compute").glob("*/ncu"), reverse=True)]
    return shutil.which("ncu") or next((str(path) for path in usual if path.exists()), None)


def ncu(run: Run, until: float) -> int:
    """Keep the profiler's counters of the data and weight gradients; skipped with its reason where it cannot."""
    program = find_ncu()
    if run.options.device != "cuda" or program is None:
        print("skipped: " + ("ncu is not installed" if program is None else "ncu watches CUDA kernels"))
        return 0
    command = [program, "--csv", "--page", "details", "--kernel-name", f"regex:{'|'.join(PROFILED)}"]
    command += [word for section in SECTIONS for word in ("--section", section)]
    command += checkout.command(RUN, "profiled", *run.words)
    code, said = run_apart(command, max(5.0, until - time.monotonic()))
    if code is None:
        print("skipped: ncu took longer than its time")
        return 0
    records = counters(said)
    if not records:
        lines = [line for line in said.splitlines() if "ERR" in line or "rror" in line] or said.splitlines()[-2:]
        print(f"skipped: ncu counted nothing (code {code}): {' | '.join(lines)[:400]}")
        return 0
    run.store.add("counters", records)
    for record in records:
        if record["metric"] in LOUD:
            print(f"  {record['kernel']:28}{record['metric']:28}{record['value']} {record['unit']}", flush=True)
    return 0


def counters(said: str) -> list[Record]:
    """Read the profiler's table: a record for each launch and metric, values as it writes them."""
    start = re.search(r'^"ID",', said, re.MULTILINE)
    if start is None:
        return []
    names = {"kernel": "Kernel Name", "launch": "ID", "metric": "Metric Name", "unit": "Metric Unit"}
    names["value"] = "Metric Value"
    rows = csv.DictReader(io.StringIO(said[start.start() :]))
    return [{key: row[name] for key, name in names.items()} for row in rows if row.get("Metric Value")]


def profiled(options: argparse.Namespace) -> None:
    """Run two steps of the first case of `kernels`: what ncu watches."""
    from bench.gpu.measure import kernels  # needs triton

    case = (kernels.TINY if options.tiny else kernels.CASES)[0]
    kernels.steps(case, options.device, 2)
