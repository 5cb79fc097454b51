"""What exact sums cost: one update checked and folded into int64, beside the formula before and plain float adds.

    python -m bench.sums [--repeats 9] [--small] [--out FILE]

The contenders take turns in every repeat, on 1 and on 2 threads, float32 deltas, medians. Before any time is reported
both exact ways have given the same bits. "whole" is what a server waits for, `Accumulator.add`: the checks of all other
fields too, about 0.3 ms. The last column compares check and add, before and now.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.common.checkout import RESULTS
from bench.common.machine import machine
from fedmoe_core.budget.limits import Budget, Cost
from fedmoe_core.messages.plan import ExpertPlan
from fedmoe_core.messages.update import ClientUpdate
from fedmoe_core.model.spec import ParamSpec
from fedmoe_core.server.accumulator import Accumulator
from fedmoe_core.server.adding import Adder
from fedmoe_core.server.blocks import reach
from fedmoe_core.server.fixed_point import SumSettings

THREADS = (1, 2)
SETTINGS = SumSettings()
WEIGHT = 0.73  # of the one client, in [0, 1]
SIZE = 1e-3  # of a delta
OLD_BLOCK = 1 << 17  # values, of the formula before
FLOATS = ("float32 add_", "float64 add_")


@dataclass(frozen=True)
class Case:
    """One model's tensors, all dense or all experts of one layer.

    Attributes:
        name: with its number of values.
        shapes: of the whole tensors.
        experts: the ones that train; empty = the tensors are dense.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    experts: tuple[int, ...] = ()

    def deltas(self) -> list[Tensor]:
        """Draw what a client sends."""
        draw = torch.Generator().manual_seed(0)
        shapes = [(len(self.experts), *shape[1:]) if self.experts else shape for shape in self.shapes]
        return [torch.randn(shape, generator=draw) * SIZE for shape in shapes]

    def rows(self, tensor: int) -> list[int]:
        """Rows of a whole tensor that a delta has."""
        return list(self.experts or range(self.shapes[tensor][0]))


def perceptron(name: str, *widths: int) -> Case:
    """Matrices and biases."""
    pairs = list(zip(widths[1:], widths, strict=False))
    return Case(name, (*pairs, *((out,) for out, _ in pairs)))


CASES = (
    perceptron("MLP, 85,614", 784, 100, 64, 10),
    perceptron("MLP, 17,100,090", 784, 3584, 3584, 400, 10),
    Case("32 of 64 experts, 8,552,448", ((64, 512, 522),), tuple(range(0, 64, 2))),
)
TRIAL = (perceptron("MLP, 43", 5, 6, 1), Case("2 of 4 experts, 12", ((4, 2, 3),), (0, 2)))


def check_before(delta: Tensor) -> tuple[float, float]:
    """The check before: the extremes of the whole tensor, then its squares in float64."""
    low, high = (float(edge) for edge in torch.aminmax(delta))
    parts = (part.to(torch.float64) for part in delta.reshape(-1).split(OLD_BLOCK))
    return max(-low, high), float(sum(torch.dot(part, part) for part in parts))


def add_before(total: Tensor, delta: Tensor, weight: int, rows: list[int]) -> None:
    """The formula before: a float64 and an int64 copy of every block, and index_add_ whatever the rows."""
    factor_B = torch.full((len(rows),), weight * 2.0**SETTINGS.scale_bits, dtype=torch.float64)
    factor_B, start = factor_B.view(-1, *[1] * (delta.dim() - 1)), 0
    for part_B in torch.tensor(rows).split(max(1, OLD_BLOCK * total.shape[0] // total.numel())):
        block = slice(start, start + len(part_B))
        scaled = delta[block].to(torch.float64, copy=True)
        total.index_add_(0, part_B, scaled.mul_(factor_B[block]).round_().to(torch.int64))
        start += len(part_B)


def exact(case: Case) -> Accumulator:
    """Sums of a model with the case's tensors; where they are dense, beside an expert of one weight."""
    kind = "expert" if case.experts else "dense"
    specs = [
        ParamSpec(f"moe.0.{i}" if case.experts else f"dense.{i}", kind, s, torch.float32, -1 + len(case.experts[:1]))
        for i, s in enumerate(case.shapes)
    ]
    if not case.experts:
        specs.append(ParamSpec("moe.0.one", "expert", (1, 1), torch.float32, 0))
    return Accumulator(specs, SETTINGS, train_dense=True)


def sent(sums: Accumulator, case: Case, deltas: list[Tensor], client: int) -> tuple[ClientUpdate, ExpertPlan]:
    """An update and its plan."""
    trained = np.isin(np.arange(sums.num_experts), case.experts)[None] if case.experts else np.zeros((1, 1), dtype=bool)
    plan = ExpertPlan(client, 0, np.ones_like(trained), trained, 1, 1, 0, Budget(), Cost())
    keyed = {spec.key: delta for spec, delta in zip(sums.specs, deltas, strict=False)}
    update = ClientUpdate(
        client, 0, plan.id, keyed, WEIGHT * trained, 0.0 * trained, 0.0, WEIGHT, None, Cost(), 1, steps=1
    )
    return update, plan


def contenders(case: Case) -> dict[str, Callable[[], None]]:
    """Every way to check or to add all deltas of a case, by name."""
    deltas, weight = case.deltas(), int(SETTINGS.quantize(WEIGHT))
    places = range(len(deltas))
    before, now = ([torch.zeros(shape, dtype=torch.int64) for shape in case.shapes] for _ in range(2))
    narrow, wide = ([torch.zeros(s, dtype=t) for s in case.shapes] for t in (torch.float32, torch.float64))
    wide_deltas, rows = [delta.double() for delta in deltas], [torch.tensor(case.rows(i)) for i in places]
    longest, sums, clients = max(delta.numel() for delta in deltas), exact(case), count()

    def checks() -> None:
        for delta in deltas:
            check_before(delta)

    def adds() -> None:
        for i in places:
            add_before(before[i], deltas[i], weight, case.rows(i))

    def adds_now() -> None:
        adder = Adder.on(torch.device("cpu"), SETTINGS, longest)
        for total, delta in zip(now, deltas, strict=True):
            if case.experts:
                adder.add(total, delta, [weight] * len(delta), list(case.experts))
            else:
                adder.add(total.unsqueeze(0), delta.unsqueeze(0), [weight], [0])

    def whole() -> None:
        outcome = sums.add(*sent(sums, case, deltas, next(clients)))
        if not outcome.accepted:
            raise SystemExit(f"{outcome.reason}; no time is worth reporting")

    def floats(totals: list[Tensor], updates: list[Tensor]) -> None:
        for i in places:
            if case.experts:
                totals[i].index_add_(0, rows[i], updates[i], alpha=WEIGHT)
            else:
                totals[i].add_(updates[i], alpha=WEIGHT)

    ways: dict[str, Callable[[], None]] = {
        "check, before": checks,
        "check": lambda: [reach(delta) for delta in deltas] and None,
        "add, before": adds,
        "add": adds_now,
        "whole": whole,
        FLOATS[0]: lambda: floats(narrow, deltas),
        FLOATS[1]: lambda: floats(wide, wide_deltas),
    }
    for way in ways.values():
        way()
    summed = list(sums.sums().numerators.values())
    if not all(
        torch.equal(one, two) and torch.equal(one, three) for one, two, three in zip(before, now, summed, strict=False)
    ):
        raise SystemExit(f"the sums of {case.name} differ; no time is worth reporting")
    return ways


def times(case: Case, threads: int, repeats: int) -> dict[str, Any]:
    """Median milliseconds of every contender on so many threads."""
    torch.set_num_threads(threads)
    # Of the last minute: where others use the cores, two threads wait for each other at the end of every operation.
    load = os.getloadavg()[0]
    ways = contenders(case)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    median = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
    return {
        "case": case.name,
        "threads": threads,
        "load": load,
        "median_ms": median,
        "quartiles_ms": {n: [1e3 * q for q in statistics.quantiles(v, n=4)] for n, v in seconds.items()},
        "times_as_fast_as_before": (median["check, before"] + median["add, before"])
        / (median["check"] + median["add"]),
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(prog="python -m bench.sums", description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--small", action="store_true", help="a few numbers, to try the command")
    parser.add_argument("--out", type=Path, default=None, help="default: bench/results/sums-cpu-DATE.json")
    chosen = parser.parse_args(arguments)
    known, threads = machine(), torch.get_num_threads()
    rows = [times(case, n, chosen.repeats) for case in (TRIAL if chosen.small else CASES) for n in THREADS]
    torch.set_num_threads(threads)
    table = Table("values", "threads", *rows[0]["median_ms"], "as fast", title="ms for one update, median")
    for row in rows:
        values = (f"{value:.2f}" for value in row["median_ms"].values())
        table.add_row(row["case"], str(row["threads"]), *values, f"{row['times_as_fast_as_before']:.2f} x")
    Console(width=130).print(table)
    out = chosen.out or RESULTS / f"sums-cpu-{known['date']}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    del known["threads"]  # each row has its own
    out.write_text(json.dumps({"machine": known, "rows": rows}, indent=1) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
