"""The combination: each token sums its rows, times their weights, in the order of its places; no atomics.

Shapes: T tokens, K top-k, R places of which the first N are rows, H hidden.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fedmoe_kernels.gpu.launch import Launch, cdiv, power_of_2

_WIDEST = 1024  # columns of a program: one 16-byte load a thread and row with 4 warps and 16-bit numbers


@triton.jit
def _combine_kernel(rows, rows_TK, weights, out, H: tl.constexpr, K: tl.constexpr, BH: tl.constexpr):
    """BH columns of one token. All K loads are in flight together; absent places read nothing and add nothing."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BH + tl.arange(0, BH)
    inside = column < H
    total = tl.zeros((BH,), tl.float32)
    for j in tl.static_range(K):
        row = tl.load(rows_TK + token * K + j)
        value = tl.load(rows + row * H + column, mask=inside & (row >= 0), other=0.0).to(tl.float32)
        if weights is not None:
            value *= tl.load(weights + token * K + j, mask=row >= 0, other=0.0).to(tl.float32)
        total += value
    tl.store(out + token * H + column, total.to(out.dtype.element_ty), mask=inside)


def combine(rows_RH: Tensor, rows_TK: Tensor, weights_TK: Tensor | None, out_TH: Tensor) -> list[Launch]:
    """Write out[t] = sum over places j that have a row of weights[t, j] * rows[rows_TK[t, j]], rounded once.

    Args:
        rows_RH: rows of any dtype; those from N on are never read.
        rows_TK: (T, K) int64, -1 where a place has no row; a token without any gets 0.
        weights_TK: None = 1 each.
        out_TH: where the sums are written, every element.
    """
    (T, H), K = out_TH.shape, rows_TK.shape[1]
    width = min(_WIDEST, power_of_2(H))
    args = {"rows": rows_RH, "rows_TK": rows_TK, "weights": weights_TK, "out": out_TH, "H": H, "K": K, "BH": width}
    moved = rows_RH.nbytes + out_TH.nbytes + rows_TK.nbytes + (0 if weights_TK is None else weights_TK.nbytes)
    return [Launch(_combine_kernel, (T, cdiv(H, width)), args, 4, 1, 0, moved)]
