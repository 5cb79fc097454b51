"""The products of one slot on its rows of a tile, with its biases and adapter: three forward and back, two for weights.

Shapes: m rows of the slot, B slots, G slots with gradient buffers, r rank, H hidden, I intermediate, F = 2 * I or I.
Every function reads rows `at` of a tile's buffer and writes where the caller says.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fedmoe_kernels.cpu.gemm import Gemm
from fedmoe_kernels.formats import Format, dequantize


class Adapter(NamedTuple):
    """Low-rank factors of one slot: W_in + scale * b_in @ a_in and W_out + scale * b_out @ a_out.

    a_in (r, H), b_in (F, r), a_out (r, I), b_out (H, r). The sum is never formed; all temporaries are (m, r).
    """

    a_in: Tensor
    b_in: Tensor
    a_out: Tensor
    b_out: Tensor
    scale: float


class Packed(NamedTuple):
    """One matrix (N, K) of a quantised stack: its codes and scales, dequantised again by every product."""

    codes: Tensor
    scale: Tensor
    whole: Tensor | None
    format: Format

    @property
    def shape(self) -> torch.Size:
        """(N, K), whatever the packing."""
        N, width = self.codes.shape
        return torch.Size((N, width * (8 // self.format.bits)))


class Expert(NamedTuple):
    """The weights one slot runs, w_in (F, H), w_out (H, I), bias_in (F,), bias_out (H,).

    `grad` is the index of its weight and bias gradients in their buffers, `adapter_grad` that of its factors; None =
    frozen.
    """

    w_in: Tensor | Packed
    w_out: Tensor | Packed
    bias_in: Tensor | None
    bias_out: Tensor | None
    adapter: Adapter | None
    grad: int | None
    adapter_grad: int | None

    @property
    def learns(self) -> bool:
        """Whether any of its own gradients can be asked for."""
        return self.grad is not None or self.adapter_grad is not None


class Gradients(NamedTuple):
    """What a backward fills in; None = not asked for, and then not computed.

    weights (T, K); w_in (G, F, H), w_out (G, H, I), bias_in (G, F), bias_out (G, H); the adapter factors in
    their own shapes, all four or none; scores (B, 6), the first six of `ExpertScores`.
    """

    weights: Tensor | None
    w_in: Tensor | None
    w_out: Tensor | None
    bias_in: Tensor | None
    bias_out: Tensor | None
    a_in: Tensor | None
    b_in: Tensor | None
    a_out: Tensor | None
    b_out: Tensor | None
    scores: Tensor | None

    @property
    def matrices(self) -> tuple[Tensor | None, ...]:
        """The buffers whose squared norm is a slot's `grad_sq`: the adapter's factors if there are any."""
        return (self.w_in, self.w_out) if self.a_in is None else (self.a_in, self.b_in, self.a_out, self.b_out)

    @property
    def want_out(self) -> bool:
        """Whether anything of the second product's weights is asked for."""
        return self.w_out is not None or self.bias_out is not None or self.a_out is not None

    @property
    def want_in(self) -> bool:
        """Whether anything of the first product's weights is asked for."""
        return self.w_in is not None or self.bias_in is not None or self.a_in is not None


def up(gemm: Gemm, expert: Expert, x_CH: Tensor, at: slice, *, out_mF: Tensor) -> None:
    """Compute z = x @ W_in.T + b_in."""
    gemm.rows_into(out_mF, x_CH, at.start, _dense(expert.w_in, x_CH), bias_N=expert.bias_in)
    if expert.adapter is not None:
        a = expert.adapter
        out_mF.addmm_(x_CH[at] @ a.a_in.t(), a.b_in.t(), alpha=a.scale)


def down(gemm: Gemm, expert: Expert, h_CI: Tensor, at: slice, *, out_mH: Tensor) -> None:
    """Compute y = h @ W_out.T + b_out, not yet weighted by the router."""
    gemm.rows_into(out_mH, h_CI, at.start, _dense(expert.w_out, h_CI), bias_N=expert.bias_out)
    if expert.adapter is not None:
        a = expert.adapter
        out_mH.addmm_(h_CI[at] @ a.a_out.t(), a.b_out.t(), alpha=a.scale)


def down_back(gemm: Gemm, expert: Expert, dy_CH: Tensor, at: slice, *, out_mI: Tensor) -> None:
    """Compute d = dy @ W_out, the gradient of h before the routing weight."""
    gemm.rows_into(out_mI, dy_CH, at.start, _dense(expert.w_out, dy_CH).t())
    if expert.adapter is not None:
        a = expert.adapter
        out_mI.addmm_(dy_CH[at] @ a.b_out, a.a_out, alpha=a.scale)


def up_back(gemm: Gemm, expert: Expert, dz_CF: Tensor, at: slice, *, out_mH: Tensor) -> None:
    """Compute dx of the rows = dz @ W_in."""
    gemm.rows_into(out_mH, dz_CF, at.start, _dense(expert.w_in, dz_CF).t())
    if expert.adapter is not None:
        a = expert.adapter
        out_mH.addmm_(dz_CF[at] @ a.b_in, a.a_in, alpha=a.scale)


def grad_out(gemm: Gemm, expert: Expert, grads: Gradients, dy_mH: Tensor, h_mI: Tensor, *, add: bool) -> None:
    """Compute dW_out = dy.T @ h and its like, dy already weighted; `add` for every piece of a slot but its first."""
    if expert.grad is not None:
        if grads.w_out is not None:
            gemm.outer_into(grads.w_out[expert.grad], dy_mH, h_mI, add=add)
        if grads.bias_out is not None:
            _sum_into(grads.bias_out[expert.grad], dy_mH, add=add)
    if expert.adapter is not None and expert.adapter_grad is not None and grads.a_out is not None:
        assert grads.b_out is not None
        a = expert.adapter
        grads.b_out[expert.adapter_grad].addmm_(dy_mH.t(), h_mI @ a.a_out.t(), beta=int(add), alpha=a.scale)
        grads.a_out[expert.adapter_grad].addmm_((dy_mH @ a.b_out).t(), h_mI, beta=int(add), alpha=a.scale)


def grad_in(gemm: Gemm, expert: Expert, grads: Gradients, dz_mF: Tensor, x_mH: Tensor, *, add: bool) -> None:
    """Compute dW_in = dz.T @ x and its like; `add` for every piece of a slot but its first."""
    if expert.grad is not None:
        if grads.w_in is not None:
            gemm.outer_into(grads.w_in[expert.grad], dz_mF, x_mH, add=add)
        if grads.bias_in is not None:
            _sum_into(grads.bias_in[expert.grad], dz_mF, add=add)
    if expert.adapter is not None and expert.adapter_grad is not None and grads.a_in is not None:
        assert grads.b_in is not None
        a = expert.adapter
        grads.b_in[expert.adapter_grad].addmm_(dz_mF.t(), x_mH @ a.a_in.t(), beta=int(add), alpha=a.scale)
        grads.a_in[expert.adapter_grad].addmm_((dz_mF @ a.b_in).t(), x_mH, beta=int(add), alpha=a.scale)


def clear(expert: Expert, grads: Gradients) -> None:
    """Zero the gradients of a slot that has no row."""
    if expert.grad is not None:
        for buffer in (grads.w_in, grads.w_out, grads.bias_in, grads.bias_out):
            if buffer is not None:
                buffer[expert.grad].zero_()
    if expert.adapter_grad is not None:
        for buffer in (grads.a_in, grads.b_in, grads.a_out, grads.b_out):
            if buffer is not None:
                buffer[expert.adapter_grad].zero_()


def _dense(weight: Tensor | Packed, like: Tensor) -> Tensor:
    return weight if isinstance(weight, Tensor) else dequantize(*weight, like.dtype)


def _sum_into(out_N: Tensor, rows_mN: Tensor, *, add: bool) -> None:
    if add:
        out_N.add_(rows_mN.sum(0))
    else:
        torch.sum(rows_mN, 0, out=out_N)
