"""The cases of bench/cases.py under pytest-benchmark, grouped so that a table shows fedmoe beside its peers.

    make bench        # or: python -m pytest bench --benchmark-columns=median,iqr,rounds

"permitted": the peer stores all experts and runs the same rows. "trainable": the peer computes every weight gradient,
for it has no way to skip some. bench/cpu.py interleaves the contenders and is the one to quote.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from cases import CASES, SHAPES, Case, Problem, Shape, problem
from peers import check, dense, fedmoe, transformers_experts

CONTENDERS: dict[str, Callable[[Problem], Callable[[], Any]]] = {
    "fedmoe": fedmoe,
    "grouped_mm": lambda task: transformers_experts(task, "grouped_mm"),
    "eager": lambda task: transformers_experts(task, "eager"),
    "dense": dense,
}


@cache
def checked(shape: Shape, case: Case) -> Problem:
    """The problem, after fedmoe has given on it what both peers give: no time is taken of a wrong result."""
    task = problem(shape, case)
    for peer in ("grouped_mm", "eager"):
        check(task, fedmoe(task), CONTENDERS[peer](task))
    return task


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_bench_experts(benchmark: Any, shape: Shape, case: Case, contender: str) -> None:
    benchmark.group = f"{shape.name} {(shape.T, shape.H, shape.I, shape.E, shape.K)}, {case.name}"
    step = CONTENDERS[contender](checked(shape, case))
    benchmark.extra_info["gflop"] = checked(shape, case).flops / 1e9
    benchmark.pedantic(step, rounds=7, warmup_rounds=2)
