"""`grouped_mm` and `grouped_outer` against plain loops in float64: values, every gradient, refusals."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fedmoe_kernels import grouped_mm, grouped_outer
from fedmoe_kernels.experts.grouped_ops import grouped_mm_op, grouped_outer_op

# Rows per slot and places beyond them: empty slots first, inside and last; one slot with all rows; no row at all.
COUNTS = [((3, 0, 40, 1, 0), 0), ((0, 7), 4), ((64,), 0), ((0, 0, 0), 2), ((0, 0), 0)]
N, K = 24, 17


def offsets_of(counts: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(counts)])


def looped_mm(a: Tensor, w: Tensor, offsets: Tensor, transposed: bool) -> Tensor:
    """The definition, row by row."""
    rows = []
    for row in range(len(a)):
        slot = int((offsets[1:] <= row).sum())
        matrix = torch.zeros_like(w[0]) if slot == len(w) else w[slot]
        rows.append(a[row] @ (matrix if transposed else matrix.T))
    return torch.stack(rows) if rows else (a.sum() + w.sum()) * a.new_zeros(0, w.shape[2 if transposed else 1])


def looped_outer(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    bounds = itertools.pairwise(offsets.tolist())
    return torch.stack([left[low:high].T @ right[low:high] for low, high in bounds])


def drawn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def near(got: Tensor, want: Tensor, what: str, tolerance: float) -> None:
    assert got.shape == want.shape, what
    error, size = float((got.detach().double() - want.detach().double()).norm()), float(want.detach().double().norm())
    assert error <= tolerance * max(size, 1e-30), f"{what}: relative error {error / size if size else error:.1e}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("counts", "beyond"), COUNTS)
def test_inv4_grouped_mm(counts: tuple[int, ...], beyond: int, transposed: bool, dtype: torch.dtype) -> None:
    R, offsets = sum(counts) + beyond, offsets_of(counts)
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    shape = (len(counts), K, N) if transposed else (len(counts), N, K)
    a, w = drawn(R, K, dtype=dtype, seed=1), drawn(*shape, dtype=dtype, seed=2) / K**0.5
    dy = drawn(R, N, dtype=dtype, seed=3)
    given = [t.clone().requires_grad_() for t in (a, w)]
    truth = [t.double().requires_grad_() for t in (a, w)]
    if beyond:
        given[0].data[R - beyond :] = torch.nan  # what lies beyond the last slot is never read
    got, want = grouped_mm(*given, offsets, transposed=transposed), looped_mm(*truth, offsets, transposed)
    near(got, want, "y", tolerance)
    assert not got[sum(counts) :].any()
    for name, one, other in zip(
        ("da", "dw"),
        torch.autograd.grad(got, given, dy),
        torch.autograd.grad(want, truth, dy.double(), materialize_grads=True),
        strict=True,
    ):
        near(one, other, name, tolerance)


@pytest.mark.parametrize(("counts", "beyond"), COUNTS)
def test_inv4_grouped_outer(counts: tuple[int, ...], beyond: int) -> None:
    R, offsets = sum(counts) + beyond, offsets_of(counts)
    left, right = (drawn(R, width, seed=width).requires_grad_() for width in (N, K))
    got, want = grouped_outer(left, right, offsets), looped_outer(left, right, offsets)
    near(got, want, "out", 1e-13)
    d = drawn(*got.shape, seed=5)
    for name, one, other in zip(
        ("dleft", "dright"),
        torch.autograd.grad(got, (left, right), d),
        torch.autograd.grad(want, (left, right), d),
        strict=True,
    ):
        near(one, other, name, 1e-13)


def test_the_operators_keep_torchs_contract() -> None:
    offsets, a, w = offsets_of((2, 0, 3)), drawn(6, 4), drawn(3, 5, 4)
    a.requires_grad_(), w.requires_grad_()
    torch.library.opcheck(grouped_mm_op, (a, w, offsets, False, "auto"))
    torch.library.opcheck(grouped_mm_op, (a, drawn(3, 4, 5).requires_grad_(), offsets, True, "auto"))
    torch.library.opcheck(grouped_outer_op, (a, drawn(6, 3).requires_grad_(), offsets, "auto"))


@pytest.mark.usefixtures("fresh_compiler")
def test_it_compiles_whole() -> None:
    offsets, a, w = offsets_of((2, 0, 3)), drawn(5, 4).requires_grad_(), drawn(3, 5, 4).requires_grad_()

    def run(a: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
        return grouped_mm(a, w, offsets).tanh()

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    want, got = (f(a, w, offsets) for f in (run, compiled))
    assert torch.equal(got, want)
    dy = drawn(*want.shape, seed=4)
    assert all(map(torch.equal, *(torch.autograd.grad(y, (a, w), dy) for y in (want, got))))


def test_strided_operands_and_gradients_are_taken_as_they_are() -> None:
    offsets, a, w = offsets_of((2, 3)), drawn(K, 5).T, drawn(2, K, N).transpose(1, 2)
    a, w = a.requires_grad_(), w.requires_grad_()
    y = grouped_mm(a, w, offsets)
    da, dw = torch.autograd.grad(y.sum(), (a, w))  # the gradient that arrives is one number, expanded
    near(y, looped_mm(a, w, offsets, False), "y", 1e-13)
    assert da.shape == a.shape
    assert dw.shape == w.shape


def test_under_autocast_both_operands_are_cast() -> None:
    offsets, a, w = offsets_of((2, 3)), drawn(5, K, dtype=torch.float32), drawn(2, N, K, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = grouped_mm(a, w, offsets)
        outer = grouped_outer(a, a, offsets)
    assert y.dtype == outer.dtype == torch.bfloat16
    near(y, looped_mm(a.double(), w.double(), offsets, False), "y", 1e-2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(w=torch.zeros(3, 4, 5)), "w is torch.float32"),
        (dict(w=torch.zeros(2, 5, 4, dtype=torch.float64)), "convert one"),
        (dict(offsets_B1=torch.tensor([0, 1, 2], dtype=torch.int32)), "must be int64"),
        (dict(offsets_B1=torch.tensor([0, 2, 1])), "never fall"),
        (dict(offsets_B1=torch.tensor([0, 1, 4])), "end at the 3 rows"),
        (dict(offsets_B1=torch.tensor([1, 1, 3])), "begin with 0"),
        (dict(a_RK=torch.zeros(3, 4, dtype=torch.int64)), "floating matrix"),
        (dict(backend="reference"), "does not exist here"),
        (dict(backend="triton"), "cannot serve grouped_mm"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, said: str) -> None:
    given = dict(a_RK=torch.zeros(3, 4), w=torch.zeros(2, 5, 4), offsets_B1=torch.tensor([0, 1, 3])) | change
    with pytest.raises(ValueError, match=said):
        grouped_mm(**given)


def test_rows_of_the_other_operand_are_counted() -> None:
    with pytest.raises(ValueError, match="as many rows"):
        grouped_outer(torch.zeros(3, 4), torch.zeros(2, 4), torch.tensor([0, 1]))
