"""Microseconds of host time of every kind of launch and of every operator, under the stand-in driver; no GPU is needed.

    python -m bench.host [--rounds 200] [--keep [FOLDER]]

What is timed is everything on the host but the driver's own work: Python, torch's dispatcher, autograd, Triton's binder
and launcher. Allocations are torch's on the CPU. Times are of this thread on its core, so that waiting for other load
does not count; everything runs in turn in every round, twice, of which the second is timed, so that load slows all rows
alike. The floor, an empty kernel and an operator that does nothing, is in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.aot.cases import PASSES, QWEN, Case, inputs_of, needs_of, step
from bench.common.checkout import RESULTS
from bench.common.markdown import table
from bench.stand_in import driver as stand_in
from bench.stand_in.run import leaves_of, served, slot_map_of
from fedmoe_kernels import moe_mlp, route
from fedmoe_kernels.gpu.experts import driver as experts
from fedmoe_kernels.gpu.launch import Launch

ARCH = "sm_90"
WARM_UP = 20
HEADS = ("case", "what", "launches", "descriptors", "us", "quartiles")
# The kernels of the table's cases of 64 rows a slot, with so few slots that no allocation is a call to the system.
_CASE = replace(QWEN, name="a quarter trains", T=32, B=4, Bt=1)
CASES = (
    _CASE,
    replace(_CASE, name="all train", Bt=4),
    replace(_CASE, name="adapters", rank=16, Bt=0),
    replace(_CASE, name="int8", format="int8"),
)
Call = Callable[[], Any]


@triton.jit
def _empty(x, n):
    pass


@triton.jit
def _twenty(a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q, r, s, t):  # noqa: E741
    pass


def operator(arguments: int) -> Call:
    """Return a call of a differentiable custom operator of torch that does nothing, with that many arguments."""
    names = ", ".join(["Tensor x", *(f"Tensor? t{i}" for i in range(arguments - 1))])
    op = torch.library.custom_op(
        f"fedmoe_bench::nothing_{arguments}",
        lambda x, *_: x.new_empty(0),
        mutates_args=(),
        schema=f"({names}) -> Tensor",
    )
    op.register_autograd(lambda ctx, grad: (None,) * arguments, setup_context=lambda ctx, inputs, output: None)
    given = [torch.empty(8, requires_grad=True), *[None] * (arguments - 1)]
    return lambda: op(*given)


class _Nothing(torch.autograd.Function):
    """The same without torch.library."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *_: None) -> Tensor:
        return x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, ...]:
        return (None,) * 28


@dataclass
class Watch:
    """An `execute` that times each launch by the kernel's name and keeps the microseconds."""

    us: dict[tuple[str, int], list[float]] = field(default_factory=dict)

    def __call__(self, launch: Launch) -> None:
        start = time.thread_time()
        launch.run()
        took = 1e6 * (time.thread_time() - start)
        descriptors = sum(
            isinstance(value, triton.tools.tensor_descriptor.TensorDescriptor) for value in launch.args.values()
        )
        self.us.setdefault((launch.kernel.fn.__name__, descriptors), []).append(took)


def floor() -> dict[str, Call]:
    """Return what every launch and every operator must cost at least."""
    x, leaf = torch.empty(1024), torch.empty(8, requires_grad=True)
    twenty = dict.fromkeys("abcdefghijklmnopqrst", x)
    return {
        "an empty kernel of two arguments": lambda: _empty[(1,)](x, 3),
        "an empty kernel of twenty, by name": lambda: _twenty[(1,)](**twenty, num_warps=4, num_stages=3),
        "an autograd.Function of 28 arguments": lambda: _Nothing.apply(leaf, *[None] * 27),
        "an operator of 1 argument": operator(1),
        "an operator of 14 arguments": operator(14),
        "an operator of 28 arguments": operator(28),
    }


def calls(case: Case) -> dict[str, Call]:
    """Return the case's operators, each as one call: the drivers alone, and as a model calls them."""
    inputs = inputs_of(case, "cpu")
    how: dict[str, Any] = {"activation": case.activation, "rows_per_slot": case.rows_per_slot, "arch": ARCH}
    how["frozen_format"] = case.format
    dy_TH = torch.empty_like(inputs.x_TH)
    _, z_RF, _ = experts.forward(inputs, keep_z=True, **how)
    leaves, options = leaves_of(case)
    matrices = [options.pop(name) for name in ("w_in", "w_out")]
    logits_TE = torch.empty(case.T, case.E, requires_grad=True)
    slot_map = slot_map_of(case)

    def routed() -> Any:
        return route(logits_TE, case.K, permitted_E=slot_map)

    def forward() -> Tensor:
        return moe_mlp(leaves[0], routing, *matrices, **options)

    def whole() -> None:
        y_TH = moe_mlp(leaves[0], routed(), *matrices, **options)
        torch.autograd.grad(y_TH, [logits_TE, *leaves], dy_TH)

    routing = routed()
    kept = replace(routing, weights_TK=routing.weights_TK.detach().requires_grad_())
    y_TH = moe_mlp(leaves[0], kept, *matrices, **options)
    slope_TK = torch.empty_like(routing.weights_TK)
    needs = needs_of(case)
    return {
        "experts.forward": lambda: experts.forward(inputs, keep_z=True, **how),
        "experts.backward": lambda: experts.backward(dy_TH, z_RF, inputs.kept, needs=needs, **how),
        "route": routed,
        "route, backward": lambda: torch.autograd.grad(routing.weights_TK, logits_TE, slope_TK, retain_graph=True),
        "moe_mlp": forward,
        "moe_mlp, backward": lambda: torch.autograd.grad(y_TH, [kept.weights_TK, *leaves], dy_TH, retain_graph=True),
        "route, moe_mlp and their backward": whole,
    }


def measure(rounds: int, driver: stand_in.StandIn) -> list[dict[str, Any]]:
    """Time everything, `rounds` times in turn, and make a row of each."""
    every: dict[tuple[str, str], Call] = {("floor", name): call for name, call in floor().items()}
    for case in CASES:
        every |= {(case.name, name): call for name, call in calls(case).items()}
    rows, times = {}, {key: [] for key in every}
    watches = {case.name: Watch() for case in CASES}
    for key, call in every.items():
        driver.reset()
        call()
        counts = driver.counts()
        rows[key] = {"launches": counts.launches, "descriptors": counts.descriptors}
    for turn in range(WARM_UP + rounds):
        if turn == WARM_UP:
            watches = {case.name: Watch() for case in CASES}
        for key, call in every.items():
            call()  # so that the code is in the core's caches, as from the second layer of a model on
            start = time.thread_time()
            call()
            took = 1e6 * (time.thread_time() - start)
            if turn >= WARM_UP:
                times[key].append(took)
        for case in CASES:
            for execute in (Launch.run, watches[case.name]):
                step(case, ARCH, dict.fromkeys(PASSES, execute), device="cpu")
    assert not driver.findings(), driver.findings()
    found = [row(*key, rows[key], times[key]) for key in every]
    for case in CASES:
        for (kernel, descriptors), took in sorted(watches[case.name].us.items()):
            counts = {"launches": 1, "descriptors": descriptors}
            found.append(row(case.name, f"launch of {kernel}", counts, took))
    plain = [us for watch in watches.values() for (_, count), took in watch.us.items() if not count for us in took]
    described = [us for watch in watches.values() for (_, count), took in watch.us.items() if count for us in took]
    found.append(row("all", "a launch without descriptors", {"launches": 1, "descriptors": 0}, plain))
    return [*found, row("all", "a launch with descriptors", {"launches": 1}, described)]


def row(case: str, what: str, counts: dict[str, int], us: list[float]) -> dict[str, Any]:
    """Make a row: the median and the quartiles of some microseconds."""
    low, middle, high = statistics.quantiles(us, n=4)
    return {"case": case, "what": what, **counts, "us": round(middle, 1), "quartiles": [round(low, 1), round(high, 1)]}


def markdown(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """Write the rows as a table, with the versions above it."""
    lines = ["# Host time", "", ", ".join(f"{name} {value}" for name, value in about.items()), ""]
    lines += ["Median and quartiles in microseconds of the thread's own time; the driver's is not in them.", ""]
    cells = [
        [*(str(found.get(name, "")) for name in HEADS[:-1]), "{} to {}".format(*found["quartiles"])] for found in rows
    ]
    return "\n".join([*lines, *table(HEADS, cells), ""])


def main() -> int:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.host", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=200)
    text = "write host-triton-VERSION.json and .md into this folder, bench/results by default"
    parser.add_argument("--keep", type=Path, nargs="?", const=RESULTS, help=text)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        driver = stand_in.activate(stand_in.build(Path(folder)), ARCH)
        with served(ARCH):
            rows = measure(chosen.rounds, driver)
    about = {"triton": triton.__version__, "torch": torch.__version__, "python": platform.python_version()}
    about |= {"machine": platform.processor() or platform.machine(), "rounds": chosen.rounds, "arch": ARCH}
    about |= {"load": round(os.getloadavg()[0], 1), "cores": os.cpu_count()}
    shown = Table(*HEADS, title="host time")
    for found in rows:
        shown.add_row(*(str(found.get(name, "")) for name in HEADS))
    Console(width=140).print(shown)
    if chosen.keep:
        path = chosen.keep / f"host-triton-{triton.__version__}"
        path.with_suffix(path.suffix + ".json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
        path.with_suffix(path.suffix + ".md").write_text(markdown(rows, about))
    return 0


if __name__ == "__main__":
    sys.exit(main())
