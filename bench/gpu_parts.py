"""The parts of the GPU run, each from the store to the store: what to run, in which order, and when to stop."""

from __future__ import annotations

import argparse
import importlib.util
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import gpu_behave
import gpu_correct
import gpu_dry
import gpu_machine
import gpu_report
import gpu_sanitize
import gpu_workers
import torch
from cases import CLIENT_CASES, STANDARD, TINY, Case, Shape
from gpu_goals import summary
from gpu_store import NOT_A_GPU, Record, Store
from gpu_time import ROUNDS, DeadDeviceError, Plan, run_case
from peers import Contender, dense, fedmoe, grouped_mm, transformers_experts
from peers_optional import OPTIONAL
from roofline import Gpu

from fedmoe_kernels.backends import can_run_triton
from fedmoe_kernels.configs import arch_of

AGAIN = 75
FEWEST_ROUNDS = 20


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
        shapes = _chosen(TINY if options.tiny else STANDARD, options.shapes, "--shapes")
        cases = _chosen(CLIENT_CASES, options.cases, "--cases")
        about = gpu_machine.about(options.device, tiny=options.tiny)
        folder = gpu_machine.CHECKOUT / "runs" if about["rehearsal"] else gpu_machine.HERE / "results"
        store = Store(about, options.results or folder, options.out)
        return cls(options, store, shapes, cases)

    def part(self, name: str, until: float) -> int:
        """Run one part; 0 = done, 1 = something is wrong, 75 = not finished at `until`."""
        about = self.store.about
        print(f"== {name}: {about['gpu'] or about['cpu']}, torch {about['torch']}, triton {about['triton']}")
        if about["rehearsal"]:
            print(f"*** {NOT_A_GPU} ***", flush=True)
        code = getattr(self, f"_{name}")(until)
        if about["rehearsal"]:
            print(f"*** {NOT_A_GPU} ***", flush=True)
        return code

    def _correct(self, until: float) -> int:
        jobs = self.options.jobs or (8 if self.options.device == "cuda" else 1)
        self._run_checks(self._checks(), jobs, until)
        self._run_checks(self._large_checks(), 1, until)
        status = {check["name"]: check["status"] for check in self.store.data["checks"]}
        every = [*self._checks(), *self._large_checks()]
        if any(name not in status for name in every):
            return self._again("correct")
        failed = [name for name in every if status[name] == "failed"]
        skipped = [name for name in every if status[name] == "skipped"]
        print(f"{len(every)} checks: {len(failed)} failed, {len(skipped)} skipped", flush=True)
        return 1 if failed else 0

    def _run_checks(self, checks: Mapping[str, gpu_correct.Check], jobs: int, until: float) -> None:
        """Run the checks that have not passed yet: one job on a CPU in this process, else each in its own."""
        done = {check["name"] for check in self.store.data["checks"] if check["status"] in ("passed", "skipped")}
        names = [name for name in checks if name not in done]
        if self.options.device == "cuda" or jobs > 1:
            options = ["--device", self.options.device, *(["--tiny"] if self.options.tiny else [])]
            records = gpu_workers.run(names, min(jobs, len(names)), options, until)
        else:
            records = (gpu_workers.result(name, checks[name]) for name in names if time.monotonic() < until)
        for record in records:
            self._replace_checks([record])
            print(f"{record['status']:>8}  {record['name']}: {record['detail']}", flush=True)

    def _checks(self) -> Mapping[str, gpu_correct.Check]:
        return _checks(self.options)

    def _large_checks(self) -> Mapping[str, gpu_correct.Check]:
        return gpu_behave.large_checks(self.options.device, _backend(self.options), tiny=self.options.tiny)

    def _replace_checks(self, records: list[Record]) -> None:
        names = {record["name"] for record in records}
        self.store.data["checks"] = [check for check in self.store.data["checks"] if check["name"] not in names]
        self.store.add("checks", records)

    def _sanitize(self, until: float) -> int:
        if not self.store.find("checks", part="sanitize", status="passed"):
            self._replace_checks(gpu_sanitize.results(self.options.device))
        found = self.store.find("checks", part="sanitize")
        for check in found:
            print(f"{check['status']:>8}  {check['name']}: {check['detail']}", flush=True)
        return 1 if any(check["status"] == "failed" for check in found) else 0

    def _warm(self, until: float) -> int:
        """Compile what `time` will start, one process a shape and number of tokens; without it `time` compiles."""
        if self.options.device != "cuda":
            print("skipped: nothing is compiled for a CPU")
            return 0
        groups: dict[tuple[str, int], list[tuple[Shape, Case]]] = {}
        for shape in self.shapes:
            for case in self.cases:
                groups.setdefault((shape.name, case.shaped(shape).T), []).append((shape, case))
        arch = arch_of(torch.device("cuda"))
        count = gpu_dry.warm(list(groups.values()), os.cpu_count() or 1, arch=arch)
        print(f"compiled what {count} launches need")
        return 0

    def _red(self) -> bool:
        """Tell whether a check has not passed; no speed is reported from a red test."""
        green = {check["name"] for check in self.store.data["checks"] if check["status"] in ("passed", "skipped")}
        red = [name for name in (*self._checks(), *self._large_checks()) if name not in green]
        if red:
            print(f"no speed from a red test: {len(red)} checks are not passed (first: {red[0]}); run `correct`")
        return bool(red)

    def _kernels(self, until: float) -> int:
        if self._red():
            return 1
        reason = can_run_triton(torch.device(self.options.device))
        if reason is not None:
            print(f"skipped: {reason}")
            return 0
        import gpu_kernels  # needs triton

        cases = gpu_kernels.TINY if self.options.tiny else gpu_kernels.CASES
        for case in cases:
            if self.store.find("kernels", case=case.name):
                continue
            if time.monotonic() > until:
                return self._again("kernels")
            rows = gpu_kernels.measure(case, self.options.device, self._peaks(), self._plan().rounds)
            self.store.add("kernels", rows)
            print(f"{case.name}: {sum(row['ms'] for row in rows):.2f} ms in {len(rows)} launches", flush=True)
        return 0

    def _time(self, until: float) -> int:
        if self._red():
            return 1
        if not self.store.data["ceilings"]:
            self.store.data["ceilings"] = gpu_machine.ceilings(self.options.device, tiny=self.options.tiny)
        contenders, plan = self._contenders(), self._plan()
        longest = 0.0
        for shape in self.shapes:
            for case in self.cases:
                if time.monotonic() + longest > until:
                    return self._again("time")
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

    def _again(self, part: str) -> int:
        print(f"out of time: {part} is not finished; start it again and it goes on here", flush=True)
        return AGAIN

    def _plan(self) -> Plan:
        rounds = self.options.rounds or ROUNDS
        if self.options.device == "cuda":
            rounds = max(rounds, FEWEST_ROUNDS)
        dtype = torch.bfloat16 if self.options.device == "cuda" else torch.float32
        return Plan(self.options.device, dtype, self._peaks(), rounds)

    def _peaks(self) -> Gpu | None:
        """Choose what percentages refer to: the data sheet, or for an unlisted GPU what it reached here."""
        if self.options.device != "cuda":
            return None
        known = gpu_machine.data_sheet(self.store.about["gpu"])
        if known is not None:
            return known
        reached = self.store.data["ceilings"]
        arch = arch_of(torch.device("cuda"))
        peaks = reached["product TFLOP/s"], reached["copy TB/s"]
        return Gpu(self.store.about["gpu"], arch, *peaks, 1, 1.0, "measured here: a bfloat16 product and a copy")

    def _contenders(self) -> list[Contender]:
        """List fedmoe and all peers that can be imported; the others are put on record once."""
        backend = _backend(self.options)
        found = [fedmoe(backend), fedmoe(backend, recompute=True), grouped_mm(), grouped_mm(compact=True)]
        makers = {f"transformers-{how}": lambda how=how: transformers_experts(how) for how in ("grouped_mm", "eager")}
        makers |= OPTIONAL if self.options.device == "cuda" else {}
        makers |= {path.stem: lambda path=path: _from_file(path) for path in self.options.peer}
        for name, make in makers.items():
            try:
                found.append(make())
            except Exception as error:
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                if not self.store.find("left_out", peer=name, status="not importable"):
                    self.store.add("left_out", [{"peer": name, "status": "not importable", "reason": reason}])
        return [*found, dense()]

    def _say(self, shape: Shape, case: Case) -> None:
        """Print the case's times in one line each."""
        for launch in ("eager", "graph"):
            rows = self.store.find("rows", shape=shape.name, case=case.name, launch=launch)
            cells: dict[str, list[str]] = {}
            for row in rows:
                cells.setdefault(row["peer"], []).append(f"{row['ms']:.2f}")
            said = ", ".join(f"{name} {'/'.join(times)}" for name, times in cells.items())
            if said:
                print(f"{shape.name}/{case.name} ({launch}, ms): {said}", flush=True)

    def _plot(self, until: float) -> int:
        for path in gpu_report.write(self.store.data, self.store.path):
            print(f"written: {path}")
        print(f"written: {self.store.path}")
        print("\n".join(summary(self.store.data)))
        return 0


def serve(options: argparse.Namespace) -> None:
    """Serve another process: as a worker of `correct`, or as what compute-sanitizer watches; no store."""
    if options.part == "sanitized":
        gpu_sanitize.run_case(_checks(options))
        return
    large = gpu_behave.large_checks(options.device, _backend(options), tiny=options.tiny)
    gpu_workers.serve({**_checks(options), **large})


def _backend(options: argparse.Namespace) -> str:
    """Choose, on a GPU, the kernels or an error, never a fallback; on a CPU its own path."""
    return "triton" if options.device == "cuda" else "auto"


def _checks(options: argparse.Namespace) -> Mapping[str, gpu_correct.Check]:
    where, tiny = (options.device, _backend(options)), options.tiny
    return {**gpu_correct.checks(*where, tiny=tiny), **gpu_behave.checks(*where, tiny=tiny)}


def _chosen(offered: Sequence, names: str, option: str) -> tuple:
    wanted = [name for name in names.split(",") if name]
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
