"""The combination in Triton's interpreter against float64."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in a process with TRITON_INTERPRET=1", allow_module_level=True)

from forward_cases import assert_near, normal, run, unwritten

from fedmoe_kernels.gpu.experts.combine import combine


def problem(T: int, K: int, H: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(rows, rows_TK, weights, out): token 0 has no row, others miss some; NaN is what does not exist."""
    generator = torch.Generator().manual_seed(1)
    real_TK = torch.rand(T, K, generator=generator) < 0.7
    real_TK[:1] = False
    n = int(real_TK.sum())
    rows_TK = torch.full((T, K), -1)
    rows_TK[real_TK] = torch.randperm(n, generator=generator)
    rows_RH = unwritten(T * K, H, dtype=dtype)
    rows_RH[:n] = normal(n, H, seed=2)
    weights_TK = normal(T, K, seed=3).where(real_TK, torch.nan)
    return rows_RH, rows_TK, weights_TK, unwritten(T, H, dtype=dtype)


def summed(rows_RH: Tensor, rows_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    weights_TK = torch.ones(rows_TK.shape) if weights_TK is None else weights_TK
    picked = rows_RH.double()[rows_TK.clamp(min=0)] * weights_TK.double()[..., None]
    return picked.where((rows_TK >= 0)[..., None], 0.0).sum(1)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(("T", "K", "H"), [(9, 3, 40), (1, 1, 16), (2, 8, 17), (3, 2, 1100)])
def test_sums(T: int, K: int, H: int, weighted: bool) -> None:
    rows_RH, rows_TK, weights_TK, out = problem(T, K, H)
    run(combine(rows_RH, rows_TK, weights_TK if weighted else None, out))
    assert_near(out, summed(rows_RH, rows_TK, weights_TK if weighted else None), "y")
    assert not out[0].any()


def test_no_token() -> None:
    run(combine(unwritten(0, 16), torch.empty(0, 4, dtype=torch.int64), None, unwritten(0, 16)))


def test_float16_is_summed_in_float32_and_rounded_once_in_the_order_of_the_places() -> None:
    rows_RH, rows_TK, weights_TK, out = problem(6, 8, 24, torch.float16)
    run(combine(rows_RH, rows_TK, weights_TK, out))
    total = torch.zeros(6, 24)
    for j in range(8):
        term = rows_RH.float()[rows_TK[:, j].clamp(min=0)] * weights_TK[:, j, None]
        total += term.where(rows_TK[:, j, None] >= 0, 0.0)
    assert torch.equal(out, total.half())
