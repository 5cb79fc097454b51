"""The up-projection: gathered tokens times each slot's w_in, both halves of a gated form in one tile, then activated.

Shapes: T tokens, R places of which the first N are rows, B slots, Bt trainable slots, H hidden, I intermediate,
F = 2 * I for gated activations and I for the others, r rank.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fedmoe_kernels.activations import ACTIVATIONS, parts
from fedmoe_kernels.gpu.blocks import (
    bias_block,
    load_within,
    matrix,
    pieces,
    position,
    row_block,
    store_block,
    tile_rows,
)
from fedmoe_kernels.gpu.experts.activate import activate
from fedmoe_kernels.gpu.experts.decode import decoded, scales
from fedmoe_kernels.gpu.experts.schedule import Schedule
from fedmoe_kernels.gpu.experts.storage import Part, Product, RankTerm, Stored, term_arguments
from fedmoe_kernels.gpu.launch import Launch
from fedmoe_kernels.tiles.lookup import Tile


@triton.jit
def _halves_block(
    w, index, n0, k0, I: tl.constexpr, H: tl.constexpr, HALVES: tl.constexpr,  # noqa: E741
    BN: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """(BK, HALVES * BN): the same columns of `HALVES` matrices (I, H) that follow each other from `index` on."""
    if TMA:
        return w.load([index, n0, k0]).reshape([HALVES * BN, BK]).T
    else:
        column = tl.arange(0, HALVES * BN)
        n, k = n0 + column % BN, k0 + tl.arange(0, BK)
        row = (index + column // BN).to(tl.int64) * I + n
        return load_within(w + row[None, :] * H + k[:, None], k[:, None], n[None, :], H, I, BK, BN)


@triton.jit(do_not_specialize=["tiles", "begin", "stop", "steps", "adapters"])
def _up_kernel(
    x, tokens, w, w_frozen, scale, whole, bias, bias_frozen, bases, rank_rows, factor, adapter_scale, z, h, table,
    tiles, begin, stop, steps, adapters,
    H: tl.constexpr, I: tl.constexpr, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr, HALVES: tl.constexpr,  # noqa: E741
    PART: tl.constexpr, RANK: tl.constexpr, CHUNK: tl.constexpr, FORMAT: tl.constexpr, SHARE: tl.constexpr,
    TALL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    SPLIT: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of BM rows by BN columns of h. Of a gated form, w is a stack (2X, I, H) of gates and ups in turn.

    Both halves are one product HALVES * BN wide, so that each step is one load and one product, with one wait.
    """
    COLUMNS: tl.constexpr = (I + BN - 1) // BN
    tile, column = position(tl.program_id(0), tiles, COLUMNS, GROUP)
    slot, first, rows, live = tile_rows(table, tile, BM)
    if slot < 0:
        return
    index, source, source_bias = matrix(slot, bases, begin, stop, w, w_frozen, bias, bias_frozen, PART)
    if index < 0:
        return
    if whole is not None:
        whole = tl.load(whole + index)
    index *= HALVES
    n0 = column * BN
    token = tl.load(tokens + rows, mask=live, other=0)
    acc = tl.zeros((BM, HALVES * BN), tl.float32)
    if RANK > 0 and slot < adapters:
        # First, not last: the term needs no second block of sums beside the product's.
        for r0 in tl.static_range(0, RANK, CHUNK):
            left = row_block(rank_rows, rows, live, first, r0, RANK, CHUNK, False)
            right = _halves_block(factor, slot * HALVES, n0, r0, I, RANK, HALVES, BN, CHUNK, False)
            acc = tl.dot(left, right, acc, input_precision=PRECISION)
        acc *= tl.load(adapter_scale + slot).to(tl.float32)
    if FORMAT != "":
        place = tl.arange(0, HALVES * BN)
        row, inside = (index + place // BN).to(tl.int64) * I + n0 + place % BN, n0 + place % BN < I
        stored = scales(scale, row, inside, 0, H, BK, SHARE, TALL)
    for step in range(steps):
        left = row_block(x, token, live, first, step * BK, H, BK, False)
        if FORMAT != "":
            ahead = scales(scale, row, inside, (step + 1) * BK, H, BK, SHARE, TALL)
            WHOLE_CODES: tl.constexpr = I % BN == 0 and H % BK == 0
            wide = decoded(
                source, stored, whole, row, inside, step * BK, H, HALVES * BN, BK, SHARE, FORMAT, WHOLE_CODES
            )
            right, stored = wide.T.to(left.dtype), ahead
        else:
            right = _halves_block(source, index, n0, step * BK, I, H, HALVES, BN, BK, TMA)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    if HALVES == 2:
        gate, up = acc.reshape(BM, 2, BN).permute(0, 2, 1).split()
    else:
        gate, up = acc, acc
    if z is not None:
        z += first.to(tl.int64) * (HALVES * I)
    if h is not None:
        h += first.to(tl.int64) * I
    # z and h now begin at the tile, and offsets within it fit 32 bits, which cost half the registers.
    row = tl.arange(0, BM)
    BIASED: tl.constexpr = bias is not None
    WIDTH: tl.constexpr = BN // SPLIT
    WHOLE: tl.constexpr = I % BN == 0
    gates, ups = pieces(gate, BM, BN, SPLIT), pieces(up, BM, BN, SPLIT)
    for i in tl.static_range(SPLIT):
        at = n0 + i * WIDTH
        _finish(
            gates[i], ups[i], source_bias, index, at, z, h, row, live, I, ACTIVATION, LIMIT, HALVES, BIASED, WIDTH,
            WHOLE,
        )  # fmt: skip


@triton.jit
def _finish(
    gate, up, bias, index, n0, z, h, row, live,
    I: tl.constexpr, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr, HALVES: tl.constexpr,  # noqa: E741
    BIASED: tl.constexpr, BN: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Columns n0..n0 + BN - 1 of a tile: add the biases, store z, activate, store h."""
    if BIASED:
        gate += bias_block(bias, index, n0, I, BN, WHOLE)
        if HALVES == 2:
            up += bias_block(bias, index + 1, n0, I, BN, WHOLE)
    if z is not None:
        store_block(z, row, live, n0, gate, HALVES * I, I, BN, WHOLE)
        if HALVES == 2:
            store_block(z + I, row, live, n0, up, HALVES * I, I, BN, WHOLE)
    if h is not None:
        if HALVES == 2:
            store_block(h, row, live, n0, activate(gate, up, ACTIVATION, LIMIT), I, I, BN, WHOLE)
        else:
            store_block(h, row, live, n0, activate(gate, gate, ACTIVATION, LIMIT), I, I, BN, WHOLE)


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
    """Compute z = x[tokens] @ w_in^T + bias_in of each row's slot, and h = f(z) from z before it is rounded.

    Args:
        x_TH: tokens.
        tokens_R: (R,) int64, the token of each row.
        w_in: (B, F, H), gated forms as [gate; up].
        bias_in: (B, F).
        z_RF, h_RI: where z and h are written; either may be None. Rows from N on are left alone.
        activation: a name as `activations.parts` takes it.
        schedule: of these rows, with blocks of `tile.m`.
        tile: sizes of the blocks.
        term: what adapters add to z.
    """
    if z_RF is None and h_RI is None:
        return []
    name, limit = parts(activation)
    halves = 2 if ACTIVATIONS[name].gated else 1
    (rows,), (_, F, H) = tokens_R.shape, w_in.trainable.shape
    common = {
        "x": x_TH,
        "tokens": tokens_R,
        "z": z_RF,
        "h": h_RI,
        "table": schedule.table_M4,
        "tiles": schedule.tiles,
        "H": H,
        "I": F // halves,
        "ACTIVATION": name,
        "LIMIT": limit,
        "HALVES": halves,
        **term_arguments(term),
    }

    def own(part: Part, cut: Tile) -> dict[str, Any]:
        return {**part.biases(bias_in, halves), "SPLIT": cut.split}

    moved = sum(t.nbytes for t in (x_TH, z_RF, h_RI) if t is not None)
    product = Product(w_in.parts, rows, F // halves, H, x_TH.dtype, moved, halves=halves)
    return product.launches(_up_kernel, schedule.tiles, tile, common, own)
