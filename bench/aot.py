"""Compile every kernel as the operators launch it, for GPUs that are not there, and check the machine code.

    python bench/aot.py [--all] [--arch sm_90] [--kernel up] [--keep]

The drivers run on meta tensors and hand over their launches instead of starting them; equal launches are compiled
once. A row passes when nothing spills, the program fits the shared memory, products run on the tensor cores that the
architecture has (warp-group products from 64 rows, a warp's own below) and operands stream past the registers. A case
passes when other numbers of tokens and slots need no other code. Beside each row stands what it is predicted to cost.
Exits 1 when anything falls short.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from aot_cases import CASES, MORE, Case, launches
from rich.console import Console
from rich.table import Table
from roofline import GPUS, Tiling, Work, expected
from sass import PRODUCTS, Code, Job, compiled, job_of, misses

from fedmoe_kernels.configs import SHARED
from fedmoe_kernels.gpu.launch import Launch

# Whose peaks a prediction takes; the GPUs of sm_86 are many, so it has none.
GPU_OF = {"sm_80": "A100", "sm_90": "H100", "sm_100": "B200"}

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One line of the table: a job, the first launch that asked for it, its code and what is wrong with it."""

    job: Job
    case: Case
    launch: Launch
    code: Code
    misses: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of the kernel, after its file's where they differ."""
        file, kernel = self.job.module.rsplit(".", 1)[-1], self.job.kernel.strip("_").removesuffix("_kernel")
        return kernel if kernel == file else f"{file}.{kernel}"

    @property
    def block(self) -> str:
        """Rows x columns x depth of the first product in a loop."""
        looped = [dot for dot in self.code.dots if dot.looped]
        return "x".join(map(str, looped[0][:3])) if looped else ""

    def tiling(self) -> Tiling:
        """What `roofline.expected` needs to know."""
        looped = [dot for dot in self.code.dots if dot.looped]
        if not looped:
            return Tiling(0)
        m, k = looped[0].m, looped[0].k
        rows, args = self.case.T * self.case.K / self.case.B, self.launch.args
        programs = float(math.prod(self.launch.grid))
        if "table" in args:  # as many tiles as there can be are launched; a slot's last one is half full on average
            programs *= min(1.0, self.case.B * max(1.0, rows / m + 0.5) / args["table"].shape[0])
        steps = args.get("steps", max(1.0, rows / k + 0.5))
        computed = programs * steps * sum(2 * dot.m * dot.n * dot.k for dot in looped)
        columns = sum(dot.n for dot in looped)
        size = self.case.dtype.itemsize
        return Tiling(
            programs=programs,
            resident=self.code.resident(self.job),
            useful=min(1.0, self.launch.flops / computed) if computed else 1.0,
            streamed=steps * k * (m + columns) * size,
            stored=m * columns * size,
        )

    def prediction(self) -> dict[str, float]:
        """Microseconds at the roofline and expected, on the GPU that stands for the architecture."""
        if self.job.arch not in GPU_OF or self.code.error or self.case.dtype == torch.float32:
            return {}
        gpu = GPUS[GPU_OF[self.job.arch]]
        work = Work(self.name, self.launch.flops, self.launch.bytes)
        likely = expected(work, gpu, self.tiling())
        return {"roof_us": 1e6 * work.seconds(gpu), "expected_us": 1e6 * likely, "of_roof": work.seconds(gpu) / likely}

    def record(self) -> dict[str, Any]:
        """The row as it is kept in bench/results: nothing in it changes from run to run."""
        job, code = self.job, self.code
        return {
            "arch": job.arch,
            "kernel": self.name,
            "case": self.case.name,
            "block": self.block,
            "warps": job.warps,
            "stages": job.stages,
            "registers": code.registers,
            "spilled_bytes": code.stack,
            "shared_bytes": code.shared,
            "programs_per_sm": code.resident(job),
            **code.opcodes,
            "waiting_loads": code.waiting,
            "flops": self.launch.flops,
            "bytes": self.launch.bytes,
            **{name: float(f"{value:.3g}") for name, value in self.prediction().items()},
            "misses": list(self.misses),
        }


def collect(cases: Iterable[Case], archs: Iterable[str], kernel: str) -> tuple[dict[Job, tuple[Case, Launch]], int]:
    """The different jobs, each with the first case and launch that asked for it, and how many launches there were."""
    jobs: dict[Job, tuple[Case, Launch]] = {}
    count = 0
    for arch in archs:
        for case in cases:
            for launch in launches(case, arch):
                job = job_of(launch, arch)
                if kernel in job.kernel:
                    count += 1
                    jobs.setdefault(job, (case, launch))
    return jobs, count


def recompiled(cases: Iterable[Case], archs: Iterable[str]) -> list[str]:
    """Kernels that other numbers of tokens and slots would have compiled again, with the arguments to blame.

    A yes or no that such numbers decide (are all experts permitted, do counts fit one block) is a case of its own.
    """
    found = []
    for arch in archs:
        for case in cases:
            before = {job_of(launch, arch) for launch in launches(case, arch)}
            after = {job_of(launch, arch) for launch in launches(case.varied(), arch)}
            for job in after - before:
                same = [other.parts() for other in before if (other.module, other.kernel) == (job.module, job.kernel)]
                changes = [_changes(parts, job.parts()) for parts in same]
                if changes and all(changes):
                    found.append(f"{job.module}.{job.kernel}: {min(changes, key=len)}")
    return sorted(set(found))


def _changes(before: dict[str, str], after: dict[str, str]) -> dict[str, str]:
    """What differs between two jobs of a kernel, but for constants that are true or false."""
    differ = {name: f"{before[name]} -> {after[name]}" for name in before if before[name] != after[name]}
    return {name: how for name, how in differ.items() if not after[name].endswith(("True", "False"))}


def compile_all(jobs: dict[Job, tuple[Case, Launch]], workers: int) -> list[Row]:
    """Compile in parallel, with a cache of its own that goes with the run, and say now and then how far it is."""
    rows: list[Row] = []
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            for job, code in zip(jobs, pool.map(compiled, jobs), strict=True):
                rows.append(Row(job, *jobs[job], code, tuple(misses(job, code))))
                if len(rows) % 25 == 0:
                    print(f"{len(rows)}/{len(jobs)} in {time.perf_counter() - started:.0f} s", file=sys.stderr)
    return rows


HEAD = (
    *("arch", "kernel", "first asked for by", "block", "warps", "stages", "regs", "spill", "KB", "per SM"),
    *("products", "copies", "GFLOP", "MB", "roof us", "expected us", "of roof", "verdict"),
)


def cells(row: Row) -> list[str]:
    """The row as text, in the order of `HEAD`."""
    code, job, count = row.code, row.job, row.code.opcodes
    likely = row.prediction()
    products = " ".join(f"{count[name]} {name}" for name in PRODUCTS if count.get(name))
    copies = " ".join(f"{count[name]} {name}" for name in ("LDGSTS", "UTMALDG") if count.get(name))
    return [
        *(job.arch, row.name, row.case.name, row.block, str(job.warps), str(job.stages)),
        *(str(code.registers), str(code.stack), f"{code.shared / 1024:.0f}", str(code.resident(job))),
        *(products, copies, f"{row.launch.flops / 1e9:.3g}", f"{row.launch.bytes / 1e6:.3g}"),
        *(f"{likely[name]:.3g}" if likely else "" for name in ("roof_us", "expected_us")),
        f"{likely['of_roof']:.0%}" if likely else "",
        "; ".join(row.misses) or "ok",
    ]


def markdown(rows: list[Row], about: dict[str, str], summary: str) -> str:
    """The table as a page."""
    lines = [
        f"# Kernels compiled ahead of time: {', '.join(f'{name} {value}' for name, value in about.items())}",
        "",
        "Written by `make aot`. Nothing here was measured on a GPU: registers, bytes and instructions are the",
        "compiler's, times are predictions (`bench/roofline.py`) for an A100, H100 or B200 at the case's size.",
        "",
        summary,
        "",
        "| " + " | ".join(HEAD) + " |",
        "|" + "---|" * len(HEAD),
        *("| " + " | ".join(cells(row)) + " |" for row in rows),
        "",
    ]
    return "\n".join(lines)


def show(rows: list[Row]) -> None:
    """The table on the terminal, in full however narrow that is."""
    table = Table(*HEAD, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*cells(row), style="red" if row.misses else None)
    Console(width=240).print(table)


def main() -> int:
    """Compile, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="more cases, and sm_86 too")
    parser.add_argument("--arch", choices=SHARED, action="append", help="only this one; may be given again")
    parser.add_argument("--kernel", default="", help="only kernels whose name has this in it")
    parser.add_argument("--keep", action="store_true", help="write bench/results/aot-triton-VERSION.json and .md")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    chosen = parser.parse_args()
    archs = chosen.arch or [arch for arch in SHARED if chosen.all or arch in GPU_OF]
    cases = CASES + MORE if chosen.all else CASES
    started = time.perf_counter()
    jobs, count = collect(cases, archs, chosen.kernel)
    rows = sorted(compile_all(jobs, chosen.workers), key=lambda row: (row.job.arch, row.name, row.case.name))
    again = recompiled(cases, archs[:1])
    show(rows)
    for line in again:
        print("compiled again:", line)
    failed = sum(1 for row in rows if row.misses)
    about = {"triton": triton.__version__, "torch": torch.__version__}
    summary = (
        f"{len(cases)} cases, {count} launches, {len(rows)} different: {len(rows) - failed} pass, {failed} fall short; "
        f"{len(again)} would be compiled again for other numbers of tokens or slots."
    )
    print(f"{summary} {time.perf_counter() - started:.0f} s")
    if chosen.keep:
        content = {**about, "rows": [row.record() for row in rows], "compiled_again": again}
        kept = RESULTS / f"aot-triton-{triton.__version__}"
        Path(f"{kept}.json").write_text(json.dumps(content, indent=1) + "\n")
        Path(f"{kept}.md").write_text(markdown(rows, about, summary))
    return 1 if failed or again or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
