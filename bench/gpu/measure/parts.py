"""The parts of the GPU run, each from the store to the store: what to run, in which order, and when to stop."""

from __future__ import annotations

import argparse
import importlib.util
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bench.common.cases import CLIENT_CASES, RECENT, STANDARD, SWEEP_CASES, TINY, Case, Shape
from bench.common.peers import Contender, dense, fedmoe, grouped_mm, transformers_experts
from bench.common.peers_graphed import graphed
from bench.common.peers_optional import OPTIONAL
from bench.common.roofline import Gpu
from bench.gpu import dry, machine, report, workers
from bench.gpu.goals import summary
from bench.gpu.measure import behave, correct, sanitize
from bench.gpu.measure import more as gpu_more
from bench.gpu.measure.timing import ROUNDS, SUSTAINED_SECONDS, DeadDeviceError, Plan, run_case
from bench.gpu.store import NOT_A_GPU, Record, Store
from fedmoe_kernels.backends import can_run_triton
from fedmoe_kernels.tiles.lookup import arch_of

AGAIN = 75
FEWEST_ROUNDS = 20
MOST_JOBS = 14  # of 16 cores; each worker compiles on one
LOUDEST = 6  # launches that are printed as they come


@dataclass(frozen=True, eq=False)
class Run:
    """One invocation: where it runs, what it measures and the store it writes to."""

    options: argparse.Namespace
    store: Store
    shapes: tuple[Shape, ...]
    cases: tuple[Case, ...]

    @classmethod
    def begin(cls, options: argparse.Namespace) -> Run:
        """Look at the machine and open the store.

        Raises:
            ValueError: without the device that is asked for, for real shapes on a CPU, or for names that do not exist.
        """
        if options.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("there is no CUDA device here; --device cpu --tiny rehearses the script without one")
        if options.device == "cpu" and not options.tiny:
            raise ValueError("--device cpu takes the tiny shapes only, and their times mean nothing; add --tiny")
        offered = TINY if options.tiny else STANDARD if not options.shapes else (*STANDARD, *RECENT)
        shapes = _chosen(offered, options.shapes, "--shapes")
        cases = _chosen((*SWEEP_CASES, *CLIENT_CASES) if options.cases else CLIENT_CASES, options.cases, "--cases")
        about = machine.about(options.device, tiny=options.tiny)
        folder = machine.CHECKOUT / "runs" if about["rehearsal"] else machine.HERE / "results"
        store = Store(about, options.results or folder, options.out)
        return cls(options, store, shapes, cases)

    @property
    def words(self) -> list[str]:
        """The options that a process which helps this run needs."""
        return ["--device", self.options.device, *(["--tiny"] if self.options.tiny else [])]

    @property
    def backend(self) -> str:
        """Which body of the operators is measured."""
        return _backend(self.options)

    def part(self, name: str, until: float) -> int:
        """Run one part; 0 = done, 1 = something is wrong, 75 = not finished at `until`."""
        about = self.store.about
        print(f"== {name}: {about['gpu'] or about['cpu']}, torch {about['torch']}, triton {about['triton']}")
        if about["rehearsal"]:
            print(f"*** {NOT_A_GPU} ***", flush=True)
        own = getattr(self, f"_{name}", None)
        code = getattr(gpu_more, name)(self, until) if own is None else own(until)
        if about["rehearsal"]:
            print(f"*** {NOT_A_GPU} ***", flush=True)
        return code

    def _correct(self, until: float) -> int:
        """Run the checks in the order in which they matter; with `--checks bfloat16` the first group alone."""
        jobs = self.options.jobs or (MOST_JOBS if self.options.device == "cuda" else 1)
        some, large = correct.in_order(self._checks()), self._large_checks()
        if self.options.checks != "all":
            some, large = {name: run for name, run in some.items() if correct.matters_first(name)}, {}
        self._run_checks(some, min(jobs, max(1, (os.cpu_count() or 1) - 2)), until)
        self._run_checks(large, 1, until)
        status = {check["name"]: check["status"] for check in self.store.find("checks")}
        every = [*some, *large]
        failed = [name for name in every if status.get(name) == "failed"]
        skipped = [name for name in every if status.get(name) == "skipped"]
        missing = len([name for name in every if name not in status])
        print(f"{len(every)} checks: {len(failed)} failed, {len(skipped)} skipped, {missing} not run", flush=True)
        if failed:
            return 1
        return self.again("correct") if missing else 0

    def _run_checks(self, checks: Mapping[str, correct.Check], jobs: int, until: float) -> None:
        """Run the checks that have not passed yet: one job on a CPU in this process, else each in its own."""
        done = {check["name"] for check in self.store.find("checks") if check["status"] in ("passed", "skipped")}
        names = [name for name in checks if name not in done]
        if self.options.device == "cuda" or jobs > 1:
            records = workers.run(names, min(jobs, len(names)), self.words, until)
        else:
            records = (workers.result(name, checks[name]) for name in names if time.monotonic() < until)
        for record in records:
            self._replace_checks([record])
            if record["status"] != "passed" or self.options.checks == "all":
                print(f"{record['status']:>8}  {record['name']}: {record['detail']}", flush=True)

    def _checks(self) -> Mapping[str, correct.Check]:
        return _checks(self.options)

    def _large_checks(self) -> Mapping[str, correct.Check]:
        return behave.large_checks(self.options.device, self.backend, tiny=self.options.tiny)

    def _replace_checks(self, records: list[Record]) -> None:
        for record in records:
            self.store.replace("checks", {"name": record["name"]}, [record])

    def _sanitize(self, until: float) -> int:
        tools = self.options.tools.split(",") if self.options.tools else sanitize.TOOLS
        watched = self.options.count
        passed = self.store.find("checks", part="sanitize", status="passed", watched=watched)
        if not passed:
            seconds = min(sanitize.SECONDS, max(5.0, (until - time.monotonic()) / (len(tools) + (not watched))))
            found = sanitize.results(self.options.device, tools, watched, seconds)
            few = f", {watched} checks" if watched else ""
            self._replace_checks([r | {"watched": watched, "name": f"{r['name']}{few}"} for r in found])
        found = self.store.find("checks", part="sanitize")
        for check in found:
            print(f"{check['status']:>8}  {check['name']}: {check['detail']}", flush=True)
        return 1 if any(check["status"] == "failed" for check in found) else 0

    def _warm(self, until: float) -> int:
        """Compile what `time` will start, each different kernel as one task; without it `time` compiles."""
        if self.options.device != "cuda":
            print("skipped: nothing is compiled for a CPU")
            return 0
        cases = [(shape, case) for shape in self.shapes for case in self.cases]
        count = dry.warm(cases, os.cpu_count() or 1, arch_of(torch.device("cuda")))
        print(f"{count} kernels are compiled")
        return 0

    def _kernels(self, until: float) -> int:
        reason = can_run_triton(torch.device(self.options.device))
        if reason is not None:
            print(f"skipped: {reason}")
            return 0
        from bench.gpu.measure import kernels  # needs triton

        offered = kernels.TINY if self.options.tiny else kernels.CASES
        for case in _chosen(offered, self.options.kernel_cases, "--kernel-cases", by=";"):
            if self.store.find("kernels", case=case.name):
                continue
            if time.monotonic() > until:
                return self.again("kernels")
            rows = kernels.measure(case, self.options.device, self._peaks(), self.plan().rounds)
            self.store.add("kernels", rows)
            print(f"{case.name}: {sum(row['ms'] for row in rows):.2f} ms in {len(rows)} launches", flush=True)
            for row in sorted(rows, key=lambda row: -row["ms"])[:LOUDEST]:
                likely = "" if row["expected ms"] is None else f", predicted {row['expected ms']:.3f}"
                print(f"  {row['kernel']:20}{row['ms']:8.3f} ms{likely}, {row['TFLOP/s']:.0f} TFLOP/s", flush=True)
        return 0

    def _time(self, until: float) -> int:
        gpu_more.ceilings(self)
        contenders, plan = self._contenders(), self.plan()
        longest = 0.0
        todo = [(shape, case) for shape in self.shapes for case in self.cases]
        for place, (shape, case) in enumerate(todo):
            if time.monotonic() + longest > until:  # the longest so far may come again
                left = ", ".join(f"{shape.name}/{case.name}" for shape, case in todo[place:])
                return self.again("time", f" (not measured: {left})")
            began = time.monotonic()
            try:
                run_case(shape, case, contenders, plan, self.store)
            except DeadDeviceError as error:
                print(f"the CUDA context is lost ({error}); the part is started again", flush=True)
                return AGAIN
            longest = max(longest, time.monotonic() - began)
            self._say(shape, case)
        missing = [r for r in self.store.data["left_out"] if r["peer"] == "fedmoe" and r["launch"] == "eager"]
        return 1 if missing else 0

    def again(self, part: str, left: str = "") -> int:
        print(f"out of time: {part} is not finished{left}; start it again and it goes on here", flush=True)
        return AGAIN

    def plan(self) -> Plan:
        rounds = self.options.rounds or ROUNDS
        if self.options.device == "cuda":
            rounds = max(rounds, FEWEST_ROUNDS)
        gpu = self.options.device == "cuda"
        seconds = (SUSTAINED_SECONDS if gpu else 0.0) if self.options.sustained is None else self.options.sustained
        dtype = torch.bfloat16 if gpu else torch.float32
        return Plan(self.options.device, dtype, self._peaks(), rounds, sustained=seconds)

    def _peaks(self) -> Gpu | None:
        """Choose what percentages refer to: the data sheet, or for an unlisted GPU what it reached here."""
        if self.options.device != "cuda":
            return None
        known = machine.data_sheet(self.store.about["gpu"])
        if known is not None:
            return known
        reached = self.store.data["ceilings"]
        arch = arch_of(torch.device("cuda"))
        peaks = reached["product TFLOP/s"], reached["copy TB/s"]
        return Gpu(self.store.about["gpu"], arch, *peaks, 1, 1.0, "measured here: a bfloat16 product and a copy")

    def _contenders(self) -> list[Contender]:
        """List fedmoe and all peers that are asked for and can be imported; the others are put on record once."""
        backend, wanted = self.backend, set(filter(None, self.options.contenders.split(",")))
        found = [fedmoe(backend), fedmoe(backend, recompute=True)]
        found += [graphed(backend)] if self.options.device == "cuda" else []
        found += [grouped_mm(), grouped_mm(compact=True)]
        makers = {f"transformers-{how}": lambda how=how: transformers_experts(how) for how in ("grouped_mm", "eager")}
        makers |= OPTIONAL if self.options.device == "cuda" else {}
        makers |= {path.stem: lambda path=path: _from_file(path) for path in self.options.peer}
        for name, make in makers.items():
            if wanted and name not in wanted:
                continue
            try:
                found.append(make())
            except Exception as error:
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                if not self.store.find("left_out", peer=name, status="not importable"):
                    self.store.add("left_out", [{"peer": name, "status": "not importable", "reason": reason}])
        return [one for one in (*found, dense()) if not wanted or one.name in wanted]

    def _say(self, shape: Shape, case: Case) -> None:
        """Print the case's times in one line each."""
        for launch in ("eager", "sustained", "graph"):
            rows = self.store.find("rows", shape=shape.name, case=case.name, launch=launch)
            cells: dict[str, list[str]] = {}
            for row in rows:
                cells.setdefault(row["peer"], []).append(f"{row['ms']:.2f}")
            said = ", ".join(f"{name} {'/'.join(times)}" for name, times in cells.items())
            if said:
                print(f"{shape.name}/{case.name} ({launch}, ms): {said}", flush=True)

    def _plot(self, until: float) -> int:
        for path in report.write(self.store.data, self.store.path):
            print(f"written: {path}")
        print(f"written: {self.store.path}")
        print("\n".join(summary(self.store.data)))
        return 0


def serve(options: argparse.Namespace) -> None:
    """Serve another process: as a worker of `correct`, or as what compute-sanitizer or ncu watches; no store."""
    if options.part == "sanitized":
        sanitize.run_case(_checks(options), options.count)
        return
    if options.part == "profiled":
        gpu_more.profiled(options)
        return
    large = behave.large_checks(options.device, _backend(options), tiny=options.tiny)
    workers.serve({**_checks(options), **large})


def _backend(options: argparse.Namespace) -> str:
    """Choose, on a GPU, the kernels or an error, never a fallback; on a CPU its own path."""
    return "triton" if options.device == "cuda" else "auto"


def _checks(options: argparse.Namespace) -> Mapping[str, correct.Check]:
    where, tiny = (options.device, _backend(options)), options.tiny
    return {**correct.checks(*where, tiny=tiny), **behave.checks(*where, tiny=tiny)}


def _chosen(offered: Sequence, names: str, option: str, *, by: str = ",") -> tuple:
    wanted = [name for name in names.split(by) if name]
    unknown = [name for name in wanted if name not in {item.name for item in offered}]
    if unknown:
        raise ValueError(f"{option} has no {unknown[0]}; choose from {', '.join(item.name for item in offered)}")
    return tuple(item for item in offered if not wanted or item.name in wanted)


def _from_file(path: Path) -> Contender:
    """Load the contender from a user's file; it is taken to be risky."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return replace(module.contender(), risky=True)
