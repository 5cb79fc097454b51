"""Rows of tokens sorted by expert, and back: the copies around the experts' products, differentiable and deterministic.

Shapes: T tokens, K choices each, R = T * K places, H hidden. Both directions gather, never add by atomics, so that two
runs give the same bits on a GPU too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedmoe_kernels import Routing


class _Gather(torch.autograd.Function):
    """x[tokens_R]; its derivative sums each token's rows."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, tokens_R: Tensor, rows_TK: Tensor) -> Tensor:
        ctx.save_for_backward(rows_TK)
        return x_TH[tokens_R.clamp(min=0)]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_RH: Tensor) -> tuple[Tensor, None, None]:
        (rows_TK,) = ctx.saved_tensors
        return summed(d_RH, rows_TK), None, None


class _Combine(torch.autograd.Function):
    """y[t] = sum over j of weights[t, j] * rows[rows_TK[t, j]]."""

    @staticmethod
    def forward(
        ctx: Any, y_RH: Tensor, weights_TK: Tensor, rows_TK: Tensor, tokens_R: Tensor, places_R: Tensor
    ) -> Tensor:
        ctx.save_for_backward(y_RH, weights_TK, rows_TK, tokens_R, places_R)
        return summed(y_RH, rows_TK, weights_TK)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_TH: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        y_RH, weights_TK, rows_TK, tokens_R, places_R = ctx.saved_tensors
        d_RH = dweights_TK = None
        if ctx.needs_input_grad[0]:
            weight_R = weights_TK.flatten()[places_R.clamp(min=0)].masked_fill(places_R < 0, 0)
            d_RH = dy_TH[tokens_R.clamp(min=0)] * weight_R.to(dy_TH.dtype)[:, None]
        if ctx.needs_input_grad[1]:
            dweights_TK = products(y_RH, dy_TH, rows_TK).to(weights_TK.dtype)
        return d_RH, dweights_TK, None, None, None


def gather(x_TH: Tensor, routing: Routing) -> Tensor:
    """Return (R, H): each row's token. Rows of no expert hold some token, and their gradient is dropped."""
    return _Gather.apply(x_TH, routing.tokens_R, routing.rows_TK)


def combine(y_RH: Tensor, routing: Routing) -> Tensor:
    """Return (T, H) in the dtype of `y_RH`: each token's rows times their routing weights, summed in float32 at least.

    Differentiable by `y_RH` and `routing.weights_TK`.
    """
    return _Combine.apply(y_RH, routing.weights_TK, routing.rows_TK, routing.tokens_R, routing.places_R)


def summed(rows_RH: Tensor, rows_TK: Tensor, weights_TK: Tensor | None = None) -> Tensor:
    """Sum each token's rows, times their weights where there are some; a place without a row, -1, counts as 0."""
    T, K = rows_TK.shape
    out_TH = torch.zeros(T, rows_RH.shape[1], dtype=_wide(rows_RH.dtype), device=rows_RH.device)
    for j in range(K):  # choice by choice: for all at once it would take K times the room
        part_TH = rows_RH[rows_TK[:, j].clamp(min=0)].to(out_TH.dtype)
        part_TH = part_TH if weights_TK is None else part_TH * weights_TK[:, j : j + 1].to(out_TH.dtype)
        out_TH += part_TH.masked_fill(rows_TK[:, j : j + 1] < 0, 0)
    return out_TH.to(rows_RH.dtype)


def products(rows_RH: Tensor, dy_TH: Tensor, rows_TK: Tensor) -> Tensor:
    """Return (T, K): the inner product of each token's dy with each of its rows, in float32 at least; -1 gives 0."""
    wide = _wide(rows_RH.dtype)
    columns = [(rows_RH[row_T.clamp(min=0)].to(wide) * dy_TH.to(wide)).sum(-1) for row_T in rows_TK.unbind(1)]
    return torch.stack(columns, dim=1).masked_fill(rows_TK < 0, 0)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
