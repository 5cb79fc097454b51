"""The up-projection: gathered tokens times each slot's w_in, both halves of a gated form in one tile, then activated.

Shapes: T tokens, R places of which the first N are rows, B slots, Bt trainable slots, H hidden, I intermediate,
F = 2 * I for gated activations and I for the others, r rank.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fedmoe_kernels.activations import ACTIVATIONS
from fedmoe_kernels.configs import Tile
from fedmoe_kernels.gpu.activate import activate
from fedmoe_kernels.gpu.blocks import bias_block, load_within, matrix, position, row_block, store_block, tile_rows
from fedmoe_kernels.gpu.launch import Launch, row_constants
from fedmoe_kernels.gpu.schedule import Schedule
from fedmoe_kernels.gpu.storage import RankTerm, Stored


@triton.jit
def _halves_block(w, index, n0, k0, I: tl.constexpr, H: tl.constexpr, HALVES: tl.constexpr,  # noqa: E741
                  BN: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """(BK, HALVES * BN): the same columns of `HALVES` matrices (I, H) that follow each other from `index` on."""
    if TMA:
        return w.load([index, n0, k0]).reshape([HALVES * BN, BK]).T
    else:
        column = tl.arange(0, HALVES * BN)
        n, k = n0 + column % BN, k0 + tl.arange(0, BK)
        row = (index + column // BN).to(tl.int64) * I + n
        return load_within(w + row[None, :] * H + k[:, None], k[:, None], n[None, :], H, I, BK, BN)


@triton.jit
def _up_kernel(
    x, tokens, w, w_frozen, bias, bias_frozen, bases, z, h, table, tiles, trainable, steps,
    H: tl.constexpr, I: tl.constexpr, ACTIVATION: tl.constexpr, HALVES: tl.constexpr, PART: tl.constexpr,  # noqa: E741
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    SPLIT: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of BM rows by BN columns of h. Of a gated form, w is a stack (2X, I, H) of gates and ups in turn.

    Both halves are one product HALVES * BN wide, so that each step is one load and one product, with one wait.
    """
    COLUMNS: tl.constexpr = (I + BN - 1) // BN
    tile, column = position(tl.program_id(0), tiles, COLUMNS, GROUP)
    slot, _, rows, live = tile_rows(table, tile, BM)
    if slot < 0:
        return
    index, source, source_bias = matrix(slot, bases, trainable, w, w_frozen, bias, bias_frozen, PART)
    index *= HALVES
    n0 = column * BN
    token = tl.load(tokens + rows, mask=live, other=0)
    acc = tl.zeros((BM, HALVES * BN), tl.float32)
    for step in range(steps):
        left = row_block(x, token, live, 0, step * BK, H, BK, False)
        right = _halves_block(source, index, n0, step * BK, I, H, HALVES, BN, BK, TMA)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    if HALVES == 2:
        gate, up = acc.reshape(BM, 2, BN).permute(0, 2, 1).split()
    else:
        gate, up = acc, acc
    _finish(gate, up, source_bias, index, n0, z, h, rows, live, I, ACTIVATION, HALVES, BM, BN, SPLIT, I % BN == 0)


@triton.jit
def _finish(
    gate, up, bias, index, n0, z, h, rows, live,
    I: tl.constexpr, ACTIVATION: tl.constexpr, HALVES: tl.constexpr,  # noqa: E741
    BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Add the biases, store z, activate and store h, in SPLIT pieces of the columns one after the other."""
    if SPLIT > 1:
        gates = gate.reshape(BM, 2, BN // 2).permute(0, 2, 1).split()
        ups = up.reshape(BM, 2, BN // 2).permute(0, 2, 1).split()
        for piece in tl.static_range(2):
            at = n0 + piece * (BN // 2)
            _finish(
                gates[piece],
                ups[piece],
                bias,
                index,
                at,
                z,
                h,
                rows,
                live,
                I,
                ACTIVATION,
                HALVES,
                BM,
                BN // 2,
                SPLIT // 2,
                WHOLE,
            )
    else:
        if bias is not None:
            gate += bias_block(bias, index, n0, I, BN, WHOLE)
            if HALVES == 2:
                up += bias_block(bias, index + 1, n0, I, BN, WHOLE)
        if z is not None:
            store_block(z, rows, live, n0, gate, HALVES * I, I, BN, WHOLE)
            if HALVES == 2:
                store_block(z + I, rows, live, n0, up, HALVES * I, I, BN, WHOLE)
        if h is not None:
            if HALVES == 2:
                store_block(h, rows, live, n0, activate(gate, up, ACTIVATION), I, I, BN, WHOLE)
            else:
                store_block(h, rows, live, n0, activate(gate, gate, ACTIVATION), I, I, BN, WHOLE)


def up(
    x_TH: Tensor,
    tokens_R: Tensor,
    w_in: Stored,
    bias_in: Stored | None,
    *,
    z_RF: Tensor | None,
    h_RI: Tensor | None,
    activation: str,
    schedule: Schedule,
    tile: Tile,
    term: RankTerm | None = None,
) -> list[Launch]:
    """z = x[tokens] @ w_in^T + bias_in of each row's slot, and h = f(z) from z before it is rounded.

    Args:
        x_TH: tokens.
        tokens_R: (R,) int64, the token of each row.
        w_in: (B, F, H), gated forms as [gate; up].
        bias_in: (B, F).
        z_RF, h_RI: where z and h are written; either may be None. Rows from N on are left alone.
        activation: a name of `activations.ACTIVATIONS`.
        schedule: of these rows, with blocks of `tile.m`.
        tile: sizes of the blocks.
        term: what adapters add to z.
    """
    if (z_RF is None and h_RI is None) or schedule.tiles == 0:
        return []
    halves = 2 if ACTIVATIONS[activation].gated else 1
    rows, H, F = tokens_R.shape[0], x_TH.shape[1], w_in.trainable.shape[1]
    intermediate = F // halves
    w, bias = w_in.split(halves), None if bias_in is None else bias_in.split(halves)
    tma = tile.tma and w.describable
    args = {
        "x": x_TH,
        "tokens": tokens_R,
        **(w.descriptors("w", (tile.n, tile.k), halves) if tma else w.pointers("w")),
        **({"bias": None, "bias_frozen": None} if bias is None else bias.pointers("bias")),
        "bases": w_in.base_of_slot_B,
        "z": z_RF,
        "h": h_RI,
        "table": schedule.table_M4,
        "tiles": schedule.tiles,
        "trainable": w_in.trainable.shape[0],
        "steps": triton.cdiv(H, tile.k),
        "H": H,
        "I": intermediate,
        "ACTIVATION": activation,
        "HALVES": halves,
        "PART": w_in.part,
        "SPLIT": tile.split,
        **row_constants(tile, x_TH.dtype, tma=tma),
    }
    written = sum(t.nbytes for t in (z_RF, h_RI) if t is not None)
    grid = (schedule.tiles * triton.cdiv(intermediate, tile.n),)
    flops, moved = 2 * rows * F * H, x_TH.nbytes + w_in.nbytes + written
    return [Launch(_up_kernel, grid, args, tile.warps, tile.stages, flops, moved)]
