"""Grouped products on a GPU: the experts' own kernels over rows and over weight gradients, without an activation.

Shapes: R rows of which the first offsets_B1[B] are in a slot, B slots, N x K or P x Q one slot's matrix. As in
`experts.driver` nothing is read from the device, and `execute=list.append` on tensors of the meta device looks at the
launches where there is no GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedmoe_kernels.gpu.experts.call import aligned
from fedmoe_kernels.gpu.experts.down import down, input_gradient
from fedmoe_kernels.gpu.experts.schedule import schedule
from fedmoe_kernels.gpu.experts.storage import Stored
from fedmoe_kernels.gpu.experts.weight_gradient import weight_gradient
from fedmoe_kernels.gpu.launch import Execute, Launch, cdiv, power_of_2, start
from fedmoe_kernels.tiles.lookup import TileSet, arch_of, tiles_for


@triton.jit(do_not_specialize=["slots", "total"])
def _clear_kernel(out, offsets, slots, total, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Write zeros to rows from offsets[slots] on: BM rows a program, most of which find none and read one number."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM).to(tl.int64)
    first = tl.load(offsets + slots)
    if tl.program_id(0) * BM + BM <= first:
        return
    absent = (rows >= first) & (rows < total)
    for n0 in range(0, N, BN):
        n = n0 + tl.arange(0, BN)
        mask = absent[:, None] & (n[None, :] < N)
        tl.store(out + rows[:, None] * N + n[None, :], tl.zeros((BM, BN), out.dtype.element_ty), mask=mask)


def clear(out_RN: Tensor, offsets_B1: Tensor) -> list[Launch]:
    """Write zeros to the rows of no slot, which the product leaves alone."""
    rows, columns = out_RN.shape
    args = {"out": out_RN, "offsets": offsets_B1, "slots": offsets_B1.shape[0] - 1, "total": rows}
    block = {"N": columns, "BM": 64, "BN": min(64, power_of_2(columns))}
    return [Launch(_clear_kernel, (cdiv(rows, block["BM"]),), args | block, 4, 1)]


def rows_product(
    a_RK: Tensor,
    w: Tensor,
    offsets_B1: Tensor,
    *,
    transposed: bool,
    arch: str | None = None,
    execute: Execute = Launch.run,
) -> Tensor:
    """Compute (R, N): a @ w[b].T of each slot's rows, w (B, N, K); or a @ w[b], w (B, K, N), if `transposed`."""
    a_RK, w, offsets_B1 = aligned(a_RK), aligned(w), offsets_B1.contiguous()
    (R, K), N = a_RK.shape, w.shape[2 if transposed else 1]
    tiles = _tiles(a_RK, offsets_B1, N, K, arch)
    out_RN = a_RK.new_empty(R, N)
    made = schedule(offsets_B1, R, tiles.rows, execute)
    if transposed:
        start(input_gradient(a_RK, Stored(w), out_RN, schedule=made, tile=tiles.input_gradient), execute)
    else:
        start(down(a_RK, Stored(w), None, out_RN, schedule=made, tile=tiles.down), execute)
    start(clear(out_RN, offsets_B1), execute)
    return out_RN


def outer_product(
    left_RP: Tensor, right_RQ: Tensor, offsets_B1: Tensor, *, arch: str | None = None, execute: Execute = Launch.run
) -> Tensor:
    """Compute (B, P, Q): left.T @ right over each slot's rows, zeros where it has none."""
    left_RP, right_RQ, offsets_B1 = aligned(left_RP), aligned(right_RQ), offsets_B1.contiguous()
    P, Q = left_RP.shape[1], right_RQ.shape[1]
    out_BPQ = left_RP.new_empty(offsets_B1.shape[0] - 1, P, Q)
    tile = _tiles(left_RP, offsets_B1, P, Q, arch).weight_gradient
    start(weight_gradient(left_RP, right_RQ, out_BPQ, offsets_B1=offsets_B1, tile=tile), execute)
    return out_BPQ


def _tiles(rows: Tensor, offsets_B1: Tensor, columns: int, depth: int, arch: str | None) -> TileSet:
    """Choose the tiles by the rows that a slot gets if they are spread evenly."""
    device = rows.device
    return tiles_for(
        arch_of(device) if arch is None else arch,
        rows.dtype,
        max(1, rows.shape[0] // (offsets_B1.shape[0] - 1)),
        hidden=columns,
        inner=depth,
        gated=False,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    )
