"""moe_mlp and its peers on CPU, all cases interleaved in one run; prints a table and writes bench/results/.

    python -m bench.cpu [--threads 4] [--repeats 15] [--out FILE]

Every contender runs once per repeat, in turn, so that other load on the machine hits all of them alike; medians are
compared. No time is reported before the results of fedmoe and its peer have been compared.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.common.cases import CASES, SHAPES, Problem, problem
from bench.common.checkout import RESULTS
from bench.common.machine import machine
from bench.common.peers import check, dense, fedmoe, step, transformers_experts


def measure(steps: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Time each step in seconds, `repeats` times, interleaved, after two warm-up rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 2):
        for name, run in steps.items():
            start = time.perf_counter()
            run()
            if turn > 1:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def run_case(task: Problem, repeats: int) -> dict[str, Any]:
    """Measure one row of the table: medians in ms and rates in GFLOP/s."""
    steps: dict[str, Callable[[], Any]] = {
        "fedmoe": step(fedmoe(), task),
        "grouped_mm": step(transformers_experts("grouped_mm"), task),
        "eager": step(transformers_experts("eager"), task),
    }
    check(task, steps["fedmoe"], steps["grouped_mm"])
    check(task, steps["fedmoe"], steps["eager"])
    seconds = measure(steps | {"dense": step(dense(), task)}, repeats)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "shape": task.shape.name,
        "case": task.case.name,
        "T,H,I,E,K": list(task.shape.sizes),
        "gflop": task.flops / 1e9,
        "median_ms": {name: 1e3 * value for name, value in median.items()},
        "quartiles_ms": {name: [1e3 * q for q in statistics.quantiles(t, n=4)] for name, t in seconds.items()},
        "over_grouped_mm": median["grouped_mm"] / median["fedmoe"],
        "over_eager": median["eager"] / median["fedmoe"],
        "of_dense_rate": median["dense"] / median["fedmoe"],  # of equal FLOPs
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """Write the rows as people read them, with geometric means at the foot."""
    out = Table("shape", "case", "GFLOP", title="forward + backward, float32: median ms, and fedmoe's speed over each")
    for name in ("fedmoe", "grouped_mm", "eager", "dense", "x grouped_mm", "x eager", "of dense rate"):
        out.add_column(name, justify="right")
    for row in rows:
        times = [f"{row['median_ms'][name]:.1f}" for name in ("fedmoe", "grouped_mm", "eager", "dense")]
        ratios = [f"{row['over_grouped_mm']:.2f}", f"{row['over_eager']:.2f}", f"{row['of_dense_rate']:.0%}"]
        out.add_row(row["shape"], row["case"], f"{row['gflop']:.1f}", *times, *ratios)
    means = [geometric_mean([row[key] for row in rows]) for key in ("over_grouped_mm", "over_eager", "of_dense_rate")]
    out.add_row("geometric mean", "", "", "", "", "", "", f"{means[0]:.2f}", f"{means[1]:.2f}", f"{means[2]:.0%}")
    return out


def geometric_mean(values: list[float]) -> float:
    """Return exp(mean(log))."""
    return math.exp(statistics.fmean(math.log(value) for value in values))


def main() -> None:
    """Run all shapes and cases."""
    parser = argparse.ArgumentParser(prog="python -m bench.cpu", description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=None, help="default: bench/results/cpu-DATE.json")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    measured_on = machine()
    rows = [run_case(problem(shape, case), chosen.repeats) for shape in SHAPES for case in CASES]
    Console(width=130).print(table(rows))
    out = chosen.out or RESULTS / f"cpu-{measured_on['date']}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    means = {key: geometric_mean([row[key] for row in rows]) for key in ("over_grouped_mm", "over_eager")}
    out.write_text(json.dumps({"machine": measured_on, "geometric_means": means, "rows": rows}, indent=1) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
