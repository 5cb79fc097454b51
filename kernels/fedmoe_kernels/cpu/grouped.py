"""Grouped products as loops over slots: rows with their slot's matrix, and two sets of rows with each other by slot.

Shapes: R rows sorted by slot, B slots, N x K or P x Q one slot's matrix. The path of CPU tensors, and of tensors on a
GPU that the kernels cannot serve.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor

from fedmoe_kernels.cpu.gemm import Gemm, gemm_for


def rows_product(a_RK: Tensor, w: Tensor, offsets: Sequence[int], *, transposed: bool) -> Tensor:
    """Compute (R, N): a @ w[b].T of each slot's rows, w (B, N, K); or a @ w[b], w (B, K, N), if `transposed`."""
    gemm, out_RN = _gemm(a_RK), a_RK.new_empty(a_RK.shape[0], w.shape[2 if transposed else 1])
    for b, (start, stop) in enumerate(itertools.pairwise(offsets)):
        if start < stop:
            gemm.rows_into(out_RN[start:stop], a_RK, start, w[b].t() if transposed else w[b])
    out_RN[offsets[-1] :].zero_()
    return out_RN


def outer_product(left_RP: Tensor, right_RQ: Tensor, offsets: Sequence[int]) -> Tensor:
    """Compute (B, P, Q): left.T @ right over each slot's rows, zeros where it has none."""
    gemm, P, Q = _gemm(left_RP), left_RP.shape[1], right_RQ.shape[1]
    out_BPQ = left_RP.new_empty(len(offsets) - 1, P, Q)
    for b, (start, stop) in enumerate(itertools.pairwise(offsets)):
        if start < stop:
            gemm.outer_into(out_BPQ[b], left_RP[start:stop], right_RQ[start:stop], add=False)
        else:
            out_BPQ[b].zero_()
    return out_BPQ


def _gemm(like: Tensor) -> Gemm:
    return gemm_for(like.dtype) if like.device.type == "cpu" else Gemm(None)
