"""The ahead-of-time table: one row for each different piece of code, one line for each whole step, as text and JSON."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.aot.cases import Case
from bench.aot.sass import PRODUCTS, Code, Job
from bench.common import markdown
from bench.common.roofline import GPUS, Gpu, Layer, Tiling, Work, backward, expected, forward, least_seconds
from fedmoe_kernels.activations import is_gated
from fedmoe_kernels.gpu.launch import Launch

# The GPU that gives a prediction its peaks; sm_86 stands for many GPUs, so it has none.
GPU_OF = {"sm_80": GPUS["A100"], "sm_90": GPUS["H100"], "sm_100": GPUS["B200"]}
# Elements that a program reads and writes after its products, for each of their columns; 1 where nothing is said.
EPILOGUE = {"up": 1.5, "data_gradient": 5.0}


@dataclass(frozen=True)
class Row:
    """A launch of a case, its job and its code, and what is wrong with that."""

    case: Case
    launch: Launch
    job: Job
    code: Code
    misses: tuple[str, ...]

    @property
    def name(self) -> str:
        """As of the launch."""
        return self.launch.name

    @property
    def block(self) -> str:
        """Rows x columns x depth of the first product in a loop."""
        looped = [dot for dot in self.code.dots if dot.looped]
        return "x".join(map(str, looped[0][:3])) if looped else ""

    @property
    def gpu(self) -> Gpu | None:
        """The GPU that predictions are made for; None without one. (float32 has its own peak.)"""
        return None if self.case.dtype == torch.float32 or self.code.error else GPU_OF.get(self.job.arch)

    def tiling(self) -> Tiling:
        """Collect what `roofline.expected` needs to know."""
        looped = [dot for dot in self.code.dots if dot.looped]
        if not looped:
            return Tiling(0)
        m, k = looped[0].m, looped[0].k
        rows, args = self.case.T * self.case.K / self.case.B, self.launch.args
        programs = float(math.prod(self.launch.grid))
        ahead = "first_tile" in args  # one loop over tiles and steps: a tile counts as a program
        if ahead:
            programs = float(args["table"].shape[0] * math.ceil(args["N"] / looped[0].n))
        if "table" in args:  # as many tiles as there can be are launched; a slot's last one is half full on average
            programs *= min(1.0, self.case.B * max(1.0, rows / m + 0.5) / args["table"].shape[0])
        busy = programs * self._share()
        steps = math.ceil(args["K"] / k) if ahead else args.get("steps", max(1.0, rows / k + 0.5))
        computed = busy * steps * sum(2 * dot.m * dot.n * dot.k for dot in looped)
        columns = sum(dot.n for dot in looped)
        size = self.case.dtype.itemsize
        return Tiling(
            programs=busy,
            resident=max(1, self.code.resident(self.job)),
            useful=min(1.0, self.launch.flops / computed) if computed else 1.0,
            streamed=steps * k * (m + columns) * size,
            stored=m * columns * size * EPILOGUE.get(self.name, 1.0),
            ahead=ahead,
            idle=programs - busy,
            issued=steps * self.code.listing.loop * self.job.warps / 4,
        )

    def _share(self) -> float:
        """Return the share of a launch's tiles that are of slots it serves; the other tiles' programs end at once."""
        args, case = self.launch.args, self.case
        if args.get("PART") != "some":
            return 1.0
        held = case.B // case.clients if case.rank else case.B
        return min(1.0, (args["stop"] - args["begin"]) / held)

    def microseconds(self) -> tuple[float, float] | None:
        """Return (at the roofline, expected) on the GPU that stands for the architecture."""
        if self.gpu is None:
            return None
        work = Work(self.name, self.launch.flops, self.launch.bytes)
        return 1e6 * work.seconds(self.gpu), 1e6 * expected(work, self.gpu, self.tiling())

    def record(self) -> dict[str, Any]:
        """Return the row as it is kept in bench/results: nothing in it changes from run to run."""
        job, code, times = self.job, self.code, self.microseconds()
        likely = {} if times is None else {"roof_us": _three(times[0]), "expected_us": _three(times[1])}
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
            "loop": code.listing.loop,
            **code.listing.opcodes,
            "flops": self.launch.flops,
            "bytes": self.launch.bytes,
            **likely,
            "misses": list(self.misses),
        }


def _three(value: float) -> float:
    return float(f"{value:.3g}")


@dataclass(frozen=True)
class Step:
    """All launches of one case on one architecture, by pass; see `cases.launches`."""

    arch: str
    case: Case
    rows: dict[str, list[Row]]

    def passes(self) -> dict[str, dict[str, float]]:
        """Predict forward and forward + backward: milliseconds at the roofline and expected, and TFLOP/s expected.

        The roofline is that of the stages in closed form, where every tensor is moved once; adapters and codes have
        none. Routing is part of the forward.
        """
        first = [*self.rows["routing"], *self.rows["forward"]]
        both = [*first, *self.rows["backward"]]
        found: dict[str, dict[str, float]] = {}
        for name, rows in (("forward", first), ("forward + backward", both)):
            times = [row.microseconds() for row in rows]
            expected_ms = sum(time[1] for time in times if time is not None) / 1e3
            flops = sum(row.launch.flops for row in rows if any(dot.looped for dot in row.code.dots))
            if expected_ms and all(time is not None for time in times):
                found[name] = {"expected_ms": _three(expected_ms), "expected_tflops": _three(flops / expected_ms / 1e9)}
                least = self._least_ms(name)
                found[name] |= (
                    {} if least is None else {"roof_ms": _three(least), "of_roof": _three(least / expected_ms)}
                )
        return found

    def _least_ms(self, name: str) -> float | None:
        case = self.case
        if case.rank or case.format or not case.keep_z:
            return None
        gated = is_gated(case.activation)
        layer = Layer(case.T, case.H, case.I, case.B, case.K, Bt=case.Bt, gated=gated, itemsize=case.dtype.itemsize)
        stages = (*forward(layer), *(backward(layer) if name != "forward" else ()))
        return 1e3 * least_seconds(stages, GPU_OF[self.arch])


HEAD = (
    *("arch", "kernel", "first asked for by", "block", "warps", "stages", "regs", "spill", "KB", "per SM"),
    *("loop", "products", "copies", "GFLOP", "MB", "roof us", "expected us", "of roof", "verdict"),
)
STEP_HEAD = ("arch", "case", "T", "slots", "trainable", "pass", "roof ms", "expected ms", "of roof", "expected TFLOP/s")


def cells(row: Row) -> list[str]:
    """Write the row as text, in the order of `HEAD`."""
    code, job, count, times = row.code, row.job, row.code.listing.opcodes, row.microseconds()
    products = " ".join(f"{count[name]} {name}" for name in PRODUCTS if count.get(name))
    copies = " ".join(f"{count[name]} {name}" for name in ("LDGSTS", "UTMALDG") if count.get(name))
    return [
        *(job.arch, row.name, row.case.name, row.block, str(job.warps), str(job.stages)),
        *(str(code.registers), str(code.stack), f"{code.shared / 1024:.0f}", str(code.resident(job))),
        *(
            str(code.listing.loop or ""),
            products,
            copies,
            f"{row.launch.flops / 1e9:.3g}",
            f"{row.launch.bytes / 1e6:.3g}",
        ),
        *(("", "", "") if times is None else (f"{times[0]:.3g}", f"{times[1]:.3g}", f"{times[0] / times[1]:.0%}")),
        "; ".join(row.misses) or "ok",
    ]


def step_cells(steps: list[Step]) -> list[list[str]]:
    """Write every pass of every step as text, in the order of `STEP_HEAD`."""
    lines = []
    for step in steps:
        case = step.case
        for name, times in step.passes().items():
            roof = f"{times['roof_ms']:.3g}" if "roof_ms" in times else ""
            share = f"{times['of_roof']:.0%}" if "of_roof" in times else ""
            sizes = (str(case.T), str(case.B), str(case.Bt))
            lines.append([step.arch, case.name, *sizes, name, roof, f"{times['expected_ms']:.3g}", share])
            lines[-1].append(f"{times['expected_tflops']:.0f}")
    return lines


def show(rows: list[Row], steps: list[Step]) -> None:
    """Print both tables on the terminal, in full however narrow that is."""
    console = Console(width=240)
    table = Table(*HEAD, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*cells(row), style="red" if row.misses else None)
    console.print(table)
    table = Table(*STEP_HEAD, box=None, pad_edge=False, title="whole steps, predicted")
    for line in step_cells(steps):
        table.add_row(*line)
    console.print(table)


def keep(rows: list[Row], steps: list[Step], about: dict[str, Any], to: Path) -> None:
    """Write `to`.json, one row a line, and `to`.md."""
    whole = [{"arch": step.arch, "case": step.case.name, "passes": step.passes()} for step in steps]
    parts = {"rows": [row.record() for row in rows], "steps": [step for step in whole if step["passes"]]}
    lists = (f'"{name}": [\n' + ",\n".join(json.dumps(line) for line in lines) + "\n]" for name, lines in parts.items())
    Path(f"{to}.json").write_text(json.dumps(about)[:-1] + ",\n" + ",\n".join(lists) + "}\n")
    text = [
        f"# Kernels compiled ahead of time by triton {about['triton']}",
        "",
        "Written by `make aot`. Nothing here was measured on a GPU: registers, bytes and instructions are the",
        "compiler's; times are predictions for an A100, H100 or B200 (`bench/common/roofline.py`: data-sheet peaks for",
        "the roofline; for what is expected, assumptions that only a GPU can confirm or refute).",
        "",
        about["summary"],
        "",
        "## Whole steps, predicted",
        "",
        *markdown.table(STEP_HEAD, step_cells(steps)),
        "",
        "## Kernels",
        "",
        *markdown.table(HEAD, [cells(row) for row in rows]),
        "",
    ]
    Path(f"{to}.md").write_text("\n".join(text))
