"""`grouped_mm` and `grouped_outer` by the Triton kernels in the interpreter, against the slot loops in float64."""

from __future__ import annotations

import itertools
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in a process with TRITON_INTERPRET=1", allow_module_level=True)

from forward_cases import CROWDED, EMPTY_SLOTS, assert_near, normal

from fedmoe_kernels import grouped_mm, grouped_outer


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("counts", "beyond"), [(EMPTY_SLOTS, 0), (CROWDED, 70), ((0, 0), 3), ((0, 0), 0)])
def test_products_and_gradients(counts: tuple[int, ...], beyond: int, transposed: bool) -> None:
    """Odd sizes: N = 40 is 2.5 blocks, K = 24 is 1.5 steps; 70 places beyond are two blocks of the clearing kernel."""
    B, N, K, R = len(counts), 40, 24, sum(counts) + beyond
    offsets = torch.tensor([0, *itertools.accumulate(counts)])
    a, w, dy = (
        normal(R, K, seed=1),
        normal(B, *((K, N) if transposed else (N, K)), seed=2) / K**0.5,
        normal(R, N, seed=3),
    )
    a[sum(counts) :] = torch.nan
    found = []
    for dtype, backend in ((torch.float64, "cpu"), (torch.float32, "triton")):
        given = [t.to(dtype).requires_grad_() for t in (a, w)]
        y = grouped_mm(*given, offsets, transposed=transposed, backend=backend)
        found.append((y.detach(), *torch.autograd.grad(y, given, dy.to(dtype))))
    for name, want, got in zip(("y", "da", "dw"), *found, strict=True):
        assert_near(got, want, name)
        assert not got[sum(counts) :].any() or name == "dw"


def test_outer_products_and_gradients() -> None:
    offsets = torch.tensor([0, *itertools.accumulate(EMPTY_SLOTS)])
    left, right = normal(sum(EMPTY_SLOTS) + 2, 40, seed=1), normal(sum(EMPTY_SLOTS) + 2, 24, seed=2)
    d, found = normal(len(EMPTY_SLOTS), 40, 24, seed=3), []
    for dtype, backend in ((torch.float64, "cpu"), (torch.float32, "triton")):
        given = [t.to(dtype).requires_grad_() for t in (left, right)]
        out = grouped_outer(*given, offsets, backend=backend)
        found.append((out.detach(), *torch.autograd.grad(out, given, d.to(dtype))))
    for name, want, got in zip(("out", "dleft", "dright"), *found, strict=True):
        assert_near(got, want, name)
