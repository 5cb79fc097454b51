"""The interpreter's bfloat16 itself: casts against torch's own rounding, bit for bit, and products against float64."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in a process with TRITON_INTERPRET=1", allow_module_level=True)

import bfloat16_interpreter
import triton
import triton.language as tl
from forward_cases import assert_near, normal, unwritten

HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    bfloat16_interpreter.install(monkeypatch.setattr)


@triton.jit
def _cast_kernel(source, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, tl.load(source + at).to(out.dtype.element_ty))


@triton.jit
def _dot_kernel(a, b, acc, out, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    m, k, n = tl.arange(0, M)[:, None], tl.arange(0, K), tl.arange(0, N)[None, :]
    left, right = tl.load(a + m * K + k[None, :]), tl.load(b + k[:, None] * N + n)
    total = tl.dot(left, right, tl.load(acc + m * N + n), input_precision="ieee")
    tl.store(out + m * N + n, total.to(out.dtype.element_ty))


@triton.jit
def _double_kernel(source, out):
    value = tl.load(source)
    tl.store(out, value + value)


def cast(values: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(len(values), dtype=dtype)
    _cast_kernel[(1,)](values, out, SIZE=len(values))
    return out


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    """NaN may be any NaN."""
    assert got.dtype == want.dtype
    assert torch.equal(got.isnan(), want.isnan())
    kept = ~want.isnan()
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[got.itemsize]
    assert torch.equal(got.view(whole)[kept], want.view(whole)[kept])


def every_kind_of_float32() -> Tensor:
    """Each upper half of the bits, so all exponents, subnormals, inf and NaN, with lower halves at and around a tie."""
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x1000, 0x3000])  # the last are ties of float16
    bits = 2**16 * torch.arange(-(2**15), 2**15)[:, None] + low
    return bits.flatten().to(torch.int32).view(torch.float32)


def random_float32() -> Tensor:
    bits = torch.randint(-(2**31), 2**31, (2**18,), generator=torch.Generator().manual_seed(1))
    return bits.to(torch.int32).view(torch.float32)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("values", [every_kind_of_float32, random_float32])
def test_float32_rounds_as_torch_rounds(values, dtype: torch.dtype) -> None:
    exact = values()
    assert_same_bits(cast(exact, dtype), exact.to(dtype))


def test_the_values_are_all_kinds() -> None:
    """Whole upper halves, and of them as many ties to the even below as above."""
    bits = every_kind_of_float32().view(torch.int32)
    assert len(bits.unique()) == 2**19
    ties = bits[(bits & 0xFFFF) == 0x8000]
    assert len(ties) == 2**16
    assert ((ties >> 16) & 1).sum() == 2**15


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("wide", [torch.float32, torch.float64, torch.float16])
def test_every_bfloat16_widens_exactly(wide: torch.dtype) -> None:
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    assert_same_bits(cast(halves, wide), halves.to(wide))


@pytest.mark.parametrize("source", [torch.float64, torch.float16, torch.int32, torch.int8])
def test_other_types_become_bfloat16_as_in_torch(source: torch.dtype) -> None:
    values = (1000 * normal(4096, seed=1)).to(source)
    if source == torch.float64:
        values[:3] = torch.tensor([1e300, -1e300, 1e-300])
    assert_same_bits(cast(values, torch.bfloat16), values.to(torch.bfloat16))


def test_bfloat16_becomes_integers_as_in_torch() -> None:
    values = (100 * normal(256, seed=1)).bfloat16()
    assert torch.equal(cast(values, torch.int32).long(), values.long())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", [16, 64])
def test_a_product_adds_up_in_float32(dtype: torch.dtype, size: int) -> None:
    a, b = normal(16, size, seed=1).to(dtype), normal(size, 32, seed=2).to(dtype)
    acc, out = normal(16, 32, seed=3), unwritten(16, 32)
    _dot_kernel[(1,)](a, b, acc, out, M=16, K=size, N=32)
    want = acc.double() + a.double() @ b.double()
    assert_near(out, want, "product", tolerance=1e-6)
    stored = unwritten(16, 32, dtype=dtype)
    _dot_kernel[(1,)](a, b, acc, stored, M=16, K=size, N=32)
    assert torch.equal(stored, out.to(dtype))


def test_arithmetic_on_bfloat16_itself_is_refused() -> None:
    one = torch.ones(1, dtype=torch.bfloat16)
    with pytest.raises(Exception, match="binary_op on bfloat16"):
        _double_kernel[(1,)](one, one.clone())


def test_without_the_change_the_interpreter_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """When this fails, Triton computes in bfloat16 by itself and this file's helper can go."""
    monkeypatch.undo()
    values = torch.tensor([1.0 + 3 * 2.0**-8, 1.0 + 2.0**-8 + 2.0**-20])
    assert not torch.equal(cast(values, torch.bfloat16), values.bfloat16())
