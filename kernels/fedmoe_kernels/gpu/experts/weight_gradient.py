"""Gradients of weights: for each trainable slot the product of two sets of rows over the rows it ran, and of biases.

Shapes: R places of which the first N are rows, X rows of an operand (tokens or places), B slots, G slots that have a
gradient, P x Q one slot's matrix.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fedmoe_kernels.gpu.blocks import position
from fedmoe_kernels.gpu.experts.storage import RowIndex
from fedmoe_kernels.gpu.launch import Launch, cdiv, dot_precision, power_of_2
from fedmoe_kernels.tiles.lookup import Tile

# Of each slot's matrix the side with fewer columns than this gives the columns of a block, whatever side it is: a
# product of whole warp groups has at least 64 rows, and any 16 columns.
_NARROW = 64


@triton.jit
def _rows_to_sum(slot, offsets, learns):
    """(first, end) of the rows of a slot; none where it does not learn."""
    start = tl.load(offsets + slot).to(tl.int32)
    stop = tl.load(offsets + slot + 1).to(tl.int32)
    if learns is not None:
        stop = tl.where(tl.load(learns + slot), stop, start)
    return start, stop


@triton.jit
def _matrix_rows(tokens, rows):
    """Which rows of an operand the rows are, in 64 bits."""
    if tokens is not None:
        return tl.load(tokens + rows).to(tl.int64)
    else:
        return rows.to(tl.int64)


@triton.constexpr_function
def _moves_back(size, block):
    """Whether the last block of a side ends with the matrix, and so overlaps the one before it."""
    return size % block != 0 and size > block and size % 16 == 0


@triton.jit
def _side(start, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """(rows or columns of a block, which of them are its own): moved back where possible, to be loaded unmasked."""
    if _moves_back(SIZE, BLOCK):
        within = tl.multiple_of(tl.minimum(start, SIZE - BLOCK), 16) + tl.arange(0, BLOCK)
        return within, within >= start
    else:
        within = start + tl.arange(0, BLOCK)
        return within, within < SIZE


@triton.jit
def _store_matrix(
    out, value, p, q, own, P: tl.constexpr, Q: tl.constexpr, WHOLE: tl.constexpr, FLIPPED: tl.constexpr
):  # fmt: skip
    places = out + q[None, :] * P + p[:, None] if FLIPPED else out + p[:, None] * Q + q[None, :]
    if WHOLE:
        tl.store(places, value)
    else:
        tl.store(places, value, mask=own)


@triton.jit(do_not_specialize=["width"])
def _weight_gradient_kernel(
    left, left_tokens, right, right_tokens, out, offsets, learns, scale, squares, width,
    P: tl.constexpr, Q: tl.constexpr, FLIPPED: tl.constexpr,
    BP: tl.constexpr, BQ: tl.constexpr, BT: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of BP x BQ of one slot's left^T @ right, BT rows a step; FLIPPED writes its transpose.

    Programs of one slot follow one another, so that its rows are read from memory once and from the L2 cache after.
    """
    DOWN: tl.constexpr = (P + BP - 1) // BP
    ACROSS: tl.constexpr = (Q + BQ - 1) // BQ
    slot = tl.program_id(0) // (DOWN * ACROSS)
    i, j = position(tl.program_id(0) % (DOWN * ACROSS), DOWN, ACROSS, GROUP)
    start, stop = _rows_to_sum(slot, offsets, learns)
    p, own_p = _side(i * BP, P, BP)
    q, own_q = _side(j * BQ, Q, BQ)
    P_EXISTS: tl.constexpr = P % BP == 0 or _moves_back(P, BP)
    Q_EXISTS: tl.constexpr = Q % BQ == 0 or _moves_back(Q, BQ)
    acc = tl.zeros((BP, BQ), tl.float32)
    # Past the slot's last row the left block is zeros and the right one is that last row again: masks on both cost 70
    # to 130 instructions a step. 0 * inf is NaN, but only where the last row's own term is inf or NaN already.
    for first in range(start, stop, BT):
        rows = first + tl.arange(0, BT)
        live = rows < stop
        rows = tl.minimum(rows, stop - 1)
        # The left block is loaded as its transpose: by `.T` it would not be fetched ahead on sm_80.
        left_at = left + (_matrix_rows(left_tokens, rows) * P)[None, :] + p[:, None]
        right_at = right + (_matrix_rows(right_tokens, rows) * Q)[:, None] + q[None, :]
        a = tl.load(left_at, mask=live[None, :] if P_EXISTS else live[None, :] & own_p[:, None], other=0.0)
        b = tl.load(right_at) if Q_EXISTS else tl.load(right_at, mask=own_q[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    if scale is not None:
        acc *= tl.load(scale + slot).to(tl.float32)
    value = acc.to(out.dtype.element_ty)
    own = own_p[:, None] & own_q[None, :]
    WHOLE: tl.constexpr = P % BP == 0 and Q % BQ == 0
    _store_matrix(out + slot.to(tl.int64) * (P * Q), value, p, q, own, P, Q, WHOLE, FLIPPED)
    if squares is not None:
        stored = value.to(tl.float32)
        if not WHOLE:
            stored = tl.where(own, stored, 0.0)
        # Two-dimensional to the end: sums of one-dimensional blocks crash Triton 3.7 on sm_100 beside a product.
        total = tl.sum(tl.sum(stored * stored, 1).reshape(1, BP), 1)
        tl.store(squares + slot * width + i * ACROSS + j + tl.arange(0, 1), total)


def _blocks(P: int, Q: int, tile: Tile) -> tuple[bool, int, int]:
    """(whether the transpose is computed, rows, columns of a block); no side is longer than the matrix needs."""
    flipped = P < _NARROW and P < Q
    down, across = (Q, P) if flipped else (P, Q)
    return flipped, min(tile.m, max(16, power_of_2(down))), min(tile.n, max(16, power_of_2(across)))


def output_blocks(P: int, Q: int, tile: Tile) -> int:
    """Count the sums of squares that `weight_gradient` leaves for each slot's P x Q matrix."""
    flipped, m, n = _blocks(P, Q, tile)
    return cdiv(Q if flipped else P, m) * cdiv(P if flipped else Q, n)


def weight_gradient(
    left_XP: Tensor,
    right_XQ: Tensor,
    out_GPQ: Tensor,
    *,
    offsets_B1: Tensor,
    left_tokens: Tensor | None = None,
    right_tokens: Tensor | None = None,
    tile: Tile,
    learns_B: Tensor | None = None,
    scale_B: Tensor | None = None,
    squares_GN: Tensor | None = None,
) -> list[Launch]:
    """Write out[g] = scale[g] * the sum over the rows of slot g of left_row^T right_row, whole, also where it is 0.

    Args:
        left_XP, right_XQ: the operands, by row, or by token where the row's token is given.
        out_GPQ: contiguous; slots from G on are not looked at.
        offsets_B1: as in `Routing`.
        left_tokens, right_tokens: (R,) int64, the row of the operand that each row reads; None = its own.
        tile: `m` and `n` sizes of an output block, `k` rows of a step. Loads of row numbers are pipelined too, and
            share the stages, so that 7 of them hold four steps; without row numbers four stages do, see
            `Tile.steps_held`.
        learns_B: bool; slots outside it get zeros and cost no product. May be longer than G.
        scale_B: any floating dtype.
        squares_GN: float32, N = `output_blocks`, rows at any distance: the squared norm of each block of the gradient
            as it is stored, that is after rounding.
    """
    G, P, Q = out_GPQ.shape
    flipped, m, n = _blocks(P, Q, tile)
    sides = [("left", left_XP, left_tokens), ("right", right_XQ, right_tokens)]
    (_, left, left_by), (_, right, right_by) = reversed(sides) if flipped else sides
    args = {
        "left": left,
        "left_tokens": left_by,
        "right": right,
        "right_tokens": right_by,
        "out": out_GPQ,
        "offsets": offsets_B1,
        "learns": learns_B,
        "scale": scale_B,
        "squares": squares_GN,
        "width": 0 if squares_GN is None else squares_GN.stride(0),
        "P": left.shape[1],
        "Q": right.shape[1],
        "FLIPPED": flipped,
        "BP": m,
        "BQ": n,
        "BT": tile.k,
        "GROUP": tile.group,
        "PRECISION": dot_precision(left.dtype),
    }
    # For predictions, rows count as spread evenly over the slots, of which G are looked at.
    by_row = left_tokens if left_tokens is not None else right_tokens
    rows = (left_XP if by_row is None else by_row).shape[0] * G // max(1, offsets_B1.shape[0] - 1)
    moved = out_GPQ.nbytes + _read(rows, left_XP) + _read(rows, right_XQ)
    grid = (G * cdiv(left.shape[1], m) * cdiv(right.shape[1], n),)  # as `output_blocks` says
    stages = tile.stages if left_by is not None or right_by is not None else tile.steps_held
    return [Launch(_weight_gradient_kernel, grid, args, tile.warps, stages, 2 * rows * P * Q, moved, tile.registers)]


def _read(rows: int, operand: Tensor) -> int:
    """The least bytes of an operand of which `rows` rows are read, some of them more than once."""
    return min(operand.shape[0], rows) * operand.shape[1] * operand.element_size()


@triton.jit
def _bias_gradient_kernel(
    values, tokens, places, weights, out, offsets, learns,
    N: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BN columns of the sum of a slot's rows, each times its routing weight where there are weights."""
    COLUMNS: tl.constexpr = (N + BN - 1) // BN
    slot = tl.program_id(0) // COLUMNS
    n = tl.program_id(0) % COLUMNS * BN + tl.arange(0, BN)
    start, stop = _rows_to_sum(slot, offsets, learns)
    acc = tl.zeros((BT, BN), tl.float32)
    for first in tl.range(start, stop, BT, num_stages=STAGES):
        rows = first + tl.arange(0, BT)
        live = rows < stop
        kept = live[:, None]
        if N % BN != 0:
            kept &= n[None, :] < N
        at = values + (_matrix_rows(tokens, tl.minimum(rows, stop - 1)) * N)[:, None] + n[None, :]
        block = tl.load(at, mask=kept, other=0.0).to(tl.float32)
        if weights is not None:
            place = tl.load(places + rows, mask=live, other=0)
            block *= tl.load(weights + place, mask=live, other=0.0).to(tl.float32)[:, None]
        acc += block
    tl.store(out + slot.to(tl.int64) * N + n, tl.sum(acc, 0).to(out.dtype.element_ty), mask=n < N)


def bias_gradient(
    values_XN: Tensor,
    out_GN: Tensor,
    *,
    offsets_B1: Tensor,
    routing: RowIndex | None = None,
    learns_B: Tensor | None = None,
) -> list[Launch]:
    """Write out[g] = the sum of the rows of slot g, zeros where it has none or does not learn.

    Without `routing` values_XN is by row (db_in, of dz); with it by token, and each row counts with its routing weight
    (db_out, of dy).
    """
    G, N = out_GN.shape
    columns = min(128, power_of_2(N))
    args = {
        "values": values_XN,
        "tokens": None if routing is None else routing.tokens_R,
        "places": None if routing is None else routing.places_R,
        "weights": None if routing is None else routing.weights_TK,
        "out": out_GN,
        "offsets": offsets_B1,
        "learns": learns_B,
        "N": N,
        "BN": columns,
        "BT": 128 // values_XN.element_size(),  # 16 KB a stage, so that four fit GPUs with 99 KB
        "STAGES": 4,
    }
    grid = (G * cdiv(N, columns),)
    places = values_XN.shape[0] if routing is None else routing.tokens_R.shape[0]
    rows = places * G // max(1, offsets_B1.shape[0] - 1)
    return [Launch(_bias_gradient_kernel, grid, args, 4, 4, 2 * rows * N, _read(rows, values_XN) + out_GN.nbytes)]
