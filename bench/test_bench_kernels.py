"""A microbenchmark of every stage, and of whole steps in every form, under the same names on a CPU and on a GPU.

    make bench        # or: python -m pytest bench/test_bench_kernels.py --benchmark-columns=median,iqr,rounds

On a CPU a stage is what the slot loops do for it (bench/common/stages.py), on a GPU the driver's launches, each run
until the device has ended it. bench/gpu/run.py times the same launches with CUDA events and a cold cache, and is the
one to quote.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from bench.common.cases import EDGE, SHAPES, STANDARD, Case, Problem, Shape, problem
from bench.common.stages import FORMS, STAGES, Cut, Stage, cut, whole

ON_GPU = torch.cuda.is_available()
HALF = Case("half trainable", trainable=0.5)
BOTH = (EDGE, SHAPES[0])


def task_of(shape: Shape) -> Problem:
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    return problem(shape, HALF, device="cuda" if ON_GPU else "cpu", dtype=dtype)


@cache
def prepared(shape: Shape) -> Cut:
    return cut(task_of(shape))


@cache
def forms(shape: Shape, form: str) -> dict[str, Stage]:
    return whole(task_of(shape), form)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("shape", (*BOTH, *STANDARD[:1]) if ON_GPU else BOTH, ids=lambda shape: shape.name)
def test_bench_kernel(benchmark: Any, shape: Shape, stage: str) -> None:
    benchmark.group = f"{shape.name} {shape.sizes}, half the experts trainable"
    timed(benchmark, prepared(shape).stages[stage])


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", BOTH, ids=lambda shape: shape.name)
def test_bench_form(benchmark: Any, shape: Shape, form: str, direction: str) -> None:
    benchmark.group = f"{shape.name} {shape.sizes}, half the experts trainable, {form}"
    timed(benchmark, forms(shape, form)[direction])


def timed(benchmark: Any, run: Stage) -> None:
    benchmark.extra_info["device"] = torch.cuda.get_device_name() if ON_GPU else "cpu"

    def ended() -> None:
        run()
        if ON_GPU:
            torch.cuda.synchronize()

    benchmark.pedantic(ended, rounds=20 if ON_GPU else 7, warmup_rounds=2)
