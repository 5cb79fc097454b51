"""A microbenchmark of every stage, on the GPU if there is one and else on the CPU, under the same names.

    make bench        # or: python -m pytest bench/test_bench_kernels.py --benchmark-columns=median,iqr,rounds

On a CPU a stage is what the slot loops do for it (bench/stages.py), on a GPU the driver's launches, each run until the
device has ended it. bench/gpu.py times the same launches with CUDA events and a cold cache, and is the one to quote.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from cases import EDGE, SHAPES, STANDARD, Case, Shape, problem
from stages import STAGES, Cut, cut

ON_GPU = torch.cuda.is_available()
HALF = Case("half trainable", trainable=0.5)
BOTH = (EDGE, SHAPES[0])


@cache
def prepared(shape: Shape) -> Cut:
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    return cut(problem(shape, HALF, device="cuda" if ON_GPU else "cpu", dtype=dtype))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("shape", (*BOTH, *STANDARD[:1]) if ON_GPU else BOTH, ids=lambda shape: shape.name)
def test_bench_kernel(benchmark: Any, shape: Shape, stage: str) -> None:
    benchmark.group = f"{shape.name} {shape.sizes}, half the experts trainable"
    benchmark.extra_info["device"] = torch.cuda.get_device_name() if ON_GPU else "cpu"
    run = prepared(shape).stages[stage]

    def ended() -> None:
        run()
        if ON_GPU:
            torch.cuda.synchronize()

    benchmark.pedantic(ended, rounds=20 if ON_GPU else 7, warmup_rounds=2)
