"""One invocation of the GPU run: where it runs, what it measures, and the store that its parts write to."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bench.common import machine
from bench.common.cases import CLIENT_CASES, RECENT, STANDARD, SWEEP_CASES, TINY, Case, Shape
from bench.common.checkout import RESULTS, ROOT
from bench.common.roofline import Gpu
from bench.gpu.measure.store import Store
from bench.gpu.measure.timing import ROUNDS, SUSTAINED_SECONDS, Plan
from fedmoe_kernels.tiles.lookup import arch_of

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
        offered = TINY if options.tiny else STANDARD if not options.shapes else (*STANDARD, *RECENT)
        shapes = chosen(offered, options.shapes, "--shapes")
        cases = chosen((*SWEEP_CASES, *CLIENT_CASES) if options.cases else CLIENT_CASES, options.cases, "--cases")
        about = machine.about(options.device, tiny=options.tiny)
        folder = ROOT / "runs" if about["rehearsal"] else RESULTS
        store = Store(about, options.results or folder, options.out)
        return cls(options, store, shapes, cases)

    @property
    def words(self) -> list[str]:
        """The options that a process which helps this run needs."""
        return ["--device", self.options.device, *(["--tiny"] if self.options.tiny else [])]

    @property
    def backend(self) -> str:
        """Which body of the operators is measured."""
        return backend_of(self.options)

    def again(self, part: str, left: str = "") -> int:
        """Say that a part is not finished; the exit code for it."""
        print(f"out of time: {part} is not finished{left}; start it again and it goes on here", flush=True)
        return AGAIN

    def plan(self) -> Plan:
        """Return how a case is measured."""
        rounds = self.options.rounds or ROUNDS
        if self.options.device == "cuda":
            rounds = max(rounds, FEWEST_ROUNDS)
        gpu = self.options.device == "cuda"
        seconds = (SUSTAINED_SECONDS if gpu else 0.0) if self.options.sustained is None else self.options.sustained
        dtype = torch.bfloat16 if gpu else torch.float32
        return Plan(self.options.device, dtype, self.peaks(), rounds, seconds)

    def peaks(self) -> Gpu | None:
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


def backend_of(options: argparse.Namespace) -> str:
    """Choose, on a GPU, the kernels or an error, never a fallback; on a CPU its own path."""
    return "triton" if options.device == "cuda" else "auto"


def chosen(offered: Sequence, names: str, option: str, *, by: str = ",") -> tuple:
    """Return those of `offered` whose names are asked for, all of them where none is.

    Raises:
        ValueError: for a name that does not exist.
    """
    wanted = [name for name in names.split(by) if name]
    unknown = [name for name in wanted if name not in {item.name for item in offered}]
    if unknown:
        raise ValueError(f"{option} has no {unknown[0]}; choose from {', '.join(item.name for item in offered)}")
    return tuple(item for item in offered if not wanted or item.name in wanted)
