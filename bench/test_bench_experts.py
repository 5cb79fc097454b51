"""The cases of bench/common/cases.py under pytest-benchmark, grouped so that a table shows fedmoe and its peers.

    make bench        # or: python -m pytest bench --benchmark-columns=median,iqr,rounds

"permitted": the peer stores all experts and runs the same rows. "trainable": the peer computes every weight gradient,
for it has no way to skip some. bench/cpu.py interleaves the contenders and is the one to quote.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

import pytest

from bench.common.cases import CASES, SHAPES, Case, Problem, Shape, problem
from bench.common.peers import Contender, check, dense, fedmoe, step, transformers_experts

CONTENDERS: Mapping[str, Callable[[], Contender]] = MappingProxyType(
    {
        "fedmoe": fedmoe,
        "grouped_mm": lambda: transformers_experts("grouped_mm"),
        "eager": lambda: transformers_experts("eager"),
        "dense": dense,
    }
)


@cache
def checked(shape: Shape, case: Case) -> Problem:
    """Return the problem, after fedmoe has given on it what both peers give: no time is taken of a wrong result."""
    task = problem(shape, case)
    for peer in ("grouped_mm", "eager"):
        check(task, step(fedmoe(), task), step(CONTENDERS[peer](), task))
    return task


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_bench_experts(benchmark: Any, shape: Shape, case: Case, contender: str) -> None:
    benchmark.group = f"{shape.name} {shape.sizes}, {case.name}"
    task = checked(shape, case)
    benchmark.extra_info["gflop"] = task.flops / 1e9
    benchmark.pedantic(step(CONTENDERS[contender](), task), rounds=7, warmup_rounds=2)
