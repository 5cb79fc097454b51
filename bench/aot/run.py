"""Compile every kernel as the operators launch it, for GPUs that are not there, and check the machine code.

    python -m bench.aot.run [--all] [--arch sm_90] [--kernel up] [--keep]

The drivers run on meta tensors and hand over their launches instead of starting them; equal launches are compiled
once. A row passes when nothing spills, the program fits the shared memory, as many programs fit an SM as its tile was
chosen for, products run on the architecture's tensor cores, operands stream past the registers, and the loop around
the products is short (`sass.misses`). A case passes when other numbers of tokens and slots need no other code. Each row
also says what it is predicted to cost. Exits 1 when anything falls short.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor

import torch
import triton

from bench.aot.cases import CASES, MORE, Case, launches
from bench.aot.sass import TARGETS, Code, Job, compiled_by, job_of, misses, table_of
from bench.aot.table import GPU_OF, Row, Step, keep, show
from bench.common.checkout import RESULTS
from fedmoe_kernels.gpu.launch import Launch

Passes = dict[str, list[tuple[Launch, Job]]]


def collect(cases: Iterable[Case], archs: Iterable[str], kernel: str) -> dict[tuple[str, Case], Passes]:
    """The launches of every case on every architecture, by pass, each with its job."""
    found: dict[tuple[str, Case], Passes] = {}
    for arch in archs:
        for case in cases:
            found[arch, case] = {
                name: [(launch, job_of(launch, arch)) for launch in started if kernel in launch.kernel.fn.__name__]
                for name, started in launches(case, table_of(arch)).items()
            }
    return found


def recompiled(cases: Iterable[Case], archs: Iterable[str]) -> list[str]:
    """Kernels that other numbers of tokens and slots would have compiled again, with the arguments to blame.

    A yes or no that such numbers decide (are all experts permitted, do counts fit one block) is a separate case.
    """
    found = []
    for arch in archs:
        for case in cases:
            before, after = (
                {job_of(launch, arch) for started in launches(plan, table_of(arch)).values() for launch in started}
                for plan in (case, case.varied())
            )
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


def compile_all(jobs: list[Job], workers: int) -> dict[Job, Code]:
    """Compile in parallel, with a cache for this run only, and say now and then how far it is."""
    codes: dict[Job, Code] = {}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            for job, code in zip(jobs, compiled_by(pool, jobs), strict=True):
                codes[job] = code
                wrong = misses(job, code)
                if wrong:
                    print(f"{job.arch} {job.kernel}: {'; '.join(wrong)}", file=sys.stderr)
                if len(codes) % 25 == 0:
                    print(f"{len(codes)}/{len(jobs)} in {time.perf_counter() - started:.0f} s", file=sys.stderr)
    return codes


def main() -> int:
    """Compile, print, keep."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.aot.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--all", action="store_true", help="more cases, and sm_86, sm_89 and sm_120 too")
    parser.add_argument("--arch", choices=TARGETS, action="append", help="only this one; may be given again")
    parser.add_argument("--kernel", default="", help="only kernels whose name has this in it")
    parser.add_argument("--keep", action="store_true", help="write bench/results/aot-triton-VERSION.json and .md")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    chosen = parser.parse_args()
    archs = chosen.arch or [arch for arch in TARGETS if chosen.all or arch in GPU_OF]
    cases = CASES + MORE if chosen.all else CASES
    started = time.perf_counter()
    found = collect(cases, archs, chosen.kernel)
    codes = compile_all(
        list(dict.fromkeys(job for passes in found.values() for _, job in _all(passes))), chosen.workers
    )
    steps = [
        Step(arch, case, {name: [_row(case, *pair, codes) for pair in pairs] for name, pairs in passes.items()})
        for (arch, case), passes in found.items()
    ]
    first: dict[Job, Row] = {}
    count = 0
    for step in steps:
        for row in (row for rows in step.rows.values() for row in rows):
            first.setdefault(row.job, row)
            count += 1
    rows = sorted(first.values(), key=lambda row: (row.job.arch, row.name, row.case.name))
    again = recompiled(cases, archs[:1])
    show(rows, [] if chosen.kernel else steps)
    for line in again:
        print("compiled again:", line)
    failed = sum(1 for row in rows if row.misses)
    summary = (
        f"{len(cases)} cases on {len(archs)} architectures, {count} launches, {len(rows)} different: "
        f"{len(rows) - failed} pass, {failed} fall short; {len(again)} would be compiled again for other numbers of "
        "tokens or slots."
    )
    print(f"{summary} {time.perf_counter() - started:.0f} s")
    if chosen.keep:
        about = {"triton": triton.__version__, "torch": torch.__version__, "summary": summary, "compiled_again": again}
        keep(rows, steps, about, RESULTS / f"aot-triton-{triton.__version__}")
    return 1 if failed or again or not rows else 0


def _all(passes: Passes) -> Iterable[tuple[Launch, Job]]:
    return (pair for pairs in passes.values() for pair in pairs)


def _row(case: Case, launch: Launch, job: Job, codes: dict[Job, Code]) -> Row:
    return Row(case, launch, job, codes[job], tuple(misses(job, codes[job])))


if __name__ == "__main__":
    sys.exit(main())
