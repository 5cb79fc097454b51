"""The parts of the GPU run, each from the store to the store: what to run, in which order, and when to stop."""

from __future__ import annotations

import argparse
import importlib.util
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import torch

from bench.aot import dry_step
from bench.common.cases import Case, Shape
from bench.common.peers import Contender, dense, fedmoe, grouped_mm, transformers_experts
from bench.common.peers_graphed import graphed
from bench.common.peers_optional import OPTIONAL
from bench.gpu import goals, more, report, summary, workers
from bench.gpu.invocation import AGAIN, Run, backend_of, chosen
from bench.gpu.measure import behave, correct, sanitize
from bench.gpu.measure.store import NOT_A_GPU, Record, sentence
from bench.gpu.measure.timing import DeadDeviceError, run_case
from fedmoe_kernels.backends import can_run_triton
from fedmoe_kernels.tiles.lookup import arch_of

MOST_JOBS = 14  # of 16 cores; each worker compiles on one


def run_part(run: Run, name: str, until: float) -> int:
    """Run one part; 0 = done, 1 = something is wrong, 75 = not finished at `until`."""
    about = run.store.about
    print(f"== {name}: {about['gpu'] or about['cpu']}, torch {about['torch']}, triton {about['triton']}")
    if about["rehearsal"]:
        print(f"*** {NOT_A_GPU} ***", flush=True)
    code = PARTS[name](run, until)
    if about["rehearsal"]:
        print(f"*** {NOT_A_GPU} ***", flush=True)
    return code


def check(run: Run, until: float) -> int:
    """Run the checks in the order in which they matter; with `--checks bfloat16` the first group alone."""
    jobs = run.options.jobs or (MOST_JOBS if run.options.device == "cuda" else 1)
    where, tiny = (run.options.device, run.backend), run.options.tiny
    some, large = correct.in_order(behave.every(*where, tiny=tiny)), behave.large_checks(*where, tiny=tiny)
    if run.options.checks != "all":
        some, large = {name: one for name, one in some.items() if correct.matters_first(name)}, {}
    _run_checks(run, some, min(jobs, max(1, (os.cpu_count() or 1) - 2)), until)
    _run_checks(run, large, 1, until)
    status = {check["name"]: check["status"] for check in run.store.find("checks")}
    every = [*some, *large]
    failed = [name for name in every if status.get(name) == "failed"]
    skipped = [name for name in every if status.get(name) == "skipped"]
    missing = len([name for name in every if name not in status])
    print(f"{len(every)} checks: {len(failed)} failed, {len(skipped)} skipped, {missing} not run", flush=True)
    if failed:
        return 1
    return run.again("correct") if missing else 0


def _run_checks(run: Run, checks: Mapping[str, correct.Check], jobs: int, until: float) -> None:
    """Run the checks that have not passed yet: one job on a CPU in this process, else each in its own."""
    done = {check["name"] for check in run.store.find("checks") if check["status"] in ("passed", "skipped")}
    names = [name for name in checks if name not in done]
    if run.options.device == "cuda" or jobs > 1:
        records = workers.run(names, min(jobs, len(names)), run.words, until)
    else:
        records = (workers.result(name, checks[name]) for name in names if time.monotonic() < until)
    for record in records:
        _replace_checks(run, [record])
        if record["status"] != "passed" or run.options.checks == "all":
            print(f"{record['status']:>8}  {record['name']}: {record['detail']}", flush=True)


def _replace_checks(run: Run, records: list[Record]) -> None:
    for record in records:
        run.store.replace("checks", {"name": record["name"]}, [record])


def watch(run: Run, until: float) -> int:
    """Have compute-sanitizer watch a small case, by every tool that has not passed yet."""
    tools = run.options.tools.split(",") if run.options.tools else sanitize.TOOLS
    watched = run.options.count
    passed = run.store.find("checks", part="sanitize", status="passed", watched=watched)
    if not passed:
        seconds = min(sanitize.SECONDS, max(5.0, (until - time.monotonic()) / (len(tools) + (not watched))))
        found = sanitize.results(run.options.device, tools, watched, seconds)
        few = f", {watched} checks" if watched else ""
        _replace_checks(run, [r | {"watched": watched, "name": f"{r['name']}{few}"} for r in found])
    found = run.store.find("checks", part="sanitize")
    for check in found:
        print(f"{check['status']:>8}  {check['name']}: {check['detail']}", flush=True)
    return 1 if any(check["status"] == "failed" for check in found) else 0


def warm(run: Run, until: float) -> int:
    """Compile what `time` will start, each different kernel as one task; without it `time` compiles."""
    if run.options.device != "cuda":
        print("skipped: nothing is compiled for a CPU")
        return 0
    cases = [(shape, case) for shape in run.shapes for case in run.cases]
    count = dry_step.warm(cases, os.cpu_count() or 1, arch_of(torch.device("cuda")))
    print(f"{count} kernels are compiled")
    return 0


def time_kernels(run: Run, until: float) -> int:
    """Time every launch of a step alone, beside its prediction."""
    reason = can_run_triton(torch.device(run.options.device))
    if reason is not None:
        print(f"skipped: {reason}")
        return 0
    from bench.gpu.measure import kernels  # needs triton

    offered = kernels.TINY if run.options.tiny else kernels.CASES
    for case in chosen(offered, run.options.kernel_cases, "--kernel-cases", by=";"):
        if run.store.find("kernels", case=case.name):
            continue
        if time.monotonic() > until:
            return run.again("kernels")
        rows = kernels.measure(case, run.options.device, run.peaks(), run.plan().rounds)
        run.store.add("kernels", rows)
        print(f"{case.name}: {sum(row['ms'] for row in rows):.2f} ms in {len(rows)} launches", flush=True)
        print("\n".join(summary.kernels(rows)), flush=True)
    return 0


def time_cases(run: Run, until: float) -> int:
    """Time every contender on every case of every shape, a case as a whole or not at all."""
    more.ceilings(run)
    contenders, plan = _contenders(run), run.plan()
    longest = 0.0
    todo = [(shape, case) for shape in run.shapes for case in run.cases]
    for place, (shape, case) in enumerate(todo):
        if time.monotonic() + longest > until:  # the longest so far may come again
            left = ", ".join(f"{shape.name}/{case.name}" for shape, case in todo[place:])
            return run.again("time", f" (not measured: {left})")
        began = time.monotonic()
        try:
            run_case(shape, case, contenders, plan, run.store)
        except DeadDeviceError as error:
            print(f"the CUDA context is lost ({error}); the part is started again", flush=True)
            return AGAIN
        longest = max(longest, time.monotonic() - began)
        _say(run, shape, case)
    missing = [r for r in run.store.data["left_out"] if r["peer"] == "fedmoe" and r["launch"] == "eager"]
    return 1 if missing else 0


def _contenders(run: Run) -> list[Contender]:
    """List fedmoe and all peers that are asked for and can be imported; the others are put on record once."""
    backend, wanted = run.backend, set(filter(None, run.options.contenders.split(",")))
    found = [fedmoe(backend), fedmoe(backend, recompute=True)]
    found += [graphed(backend)] if run.options.device == "cuda" else []
    found += [grouped_mm(), grouped_mm(compact=True)]
    makers = {f"transformers-{how}": lambda how=how: transformers_experts(how) for how in ("grouped_mm", "eager")}
    makers |= OPTIONAL if run.options.device == "cuda" else {}
    makers |= {path.stem: lambda path=path: _from_file(path) for path in run.options.peer}
    for name, make in makers.items():
        if wanted and name not in wanted:
            continue
        try:
            found.append(make())
        except Exception as error:
            left = {"peer": name, "status": "not importable"}
            if not run.store.find("left_out", **left):
                run.store.add("left_out", [left | {"reason": sentence(error)}])
    return [one for one in (*found, dense()) if not wanted or one.name in wanted]


def _say(run: Run, shape: Shape, case: Case) -> None:
    """Print the case's times in one line each."""
    for launch in ("eager", "sustained", "graph"):
        rows = run.store.find("rows", shape=shape.name, case=case.name, launch=launch)
        cells: dict[str, list[str]] = {}
        for row in rows:
            cells.setdefault(row["peer"], []).append(f"{row['ms']:.2f}")
        said = ", ".join(f"{name} {'/'.join(times)}" for name, times in cells.items())
        if said:
            print(f"{shape.name}/{case.name} ({launch}, ms): {said}", flush=True)


def plot(run: Run, until: float) -> int:
    """Write the table and the plots beside the results, and say how they stand against the goals."""
    for path in report.write(run.store.data, run.store.path):
        print(f"written: {path}")
    print(f"written: {run.store.path}")
    print("\n".join(goals.summary(run.store.data)))
    return 0


PARTS: Mapping[str, Callable[[Run, float], int]] = MappingProxyType(
    {
        "facts": more.facts,
        "correct": check,
        "sanitize": watch,
        "warm": warm,
        "time": time_cases,
        "routing": more.routing,
        "model": more.model,
        "kernels": time_kernels,
        "tune": more.tune,
        "ncu": more.ncu,
        "plot": plot,
    }
)


def serve(options: argparse.Namespace) -> None:
    """Serve another process: as a worker of `correct`, or as what compute-sanitizer or ncu watches; no store."""
    where, tiny = (options.device, backend_of(options)), options.tiny
    if options.part == "profiled":
        more.profiled(options)
    elif options.part == "sanitized":
        sanitize.run_case(behave.every(*where, tiny=tiny), options.count)
    else:
        workers.serve({**behave.every(*where, tiny=tiny), **behave.large_checks(*where, tiny=tiny)})


def _from_file(path: Path) -> Contender:
    """Load the contender from a user's file; it is taken to be risky."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return replace(module.contender(), risky=True)
