"""Small sums by row: the gradient of each routing weight, the importance of each slot, and its outputs' norms.

Shapes: T tokens, K top-k, R = T * K places of which the first N are rows, B slots, G slots with a weight gradient,
M tiles, C column blocks, S pieces of tiles, H hidden. Every sum runs in one fixed order that depends on its own slot
only.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fedmoe_kernels.gpu.blocks import matrix
from fedmoe_kernels.gpu.experts.schedule import Schedule
from fedmoe_kernels.gpu.experts.storage import RowIndex, Stored
from fedmoe_kernels.gpu.launch import Launch, power_of_2

# Rows of a program: a tile of 128 rows is four of them, so that few long tiles still fill a GPU.
_PIECE = 32


@triton.jit
def _add_columns(partial, rows, live, COLUMNS: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr):
    """The sum of each row of a matrix (X, COLUMNS) of partial sums, BC columns at once: (BM,)."""
    acc = tl.zeros((BM, BC), tl.float32)
    for c0 in range(0, COLUMNS, BC):
        c = c0 + tl.arange(0, BC)
        kept = live[:, None] & (c[None, :] < COLUMNS)
        acc += tl.load(partial + rows[:, None] * COLUMNS + c[None, :], mask=kept, other=0.0)
    return tl.sum(acc, 1)


@triton.jit
def _bias_product(dy, token, live, bias, index, H: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    """<dy[token], bias[index]> of each row: (BM,) float32."""
    acc = tl.zeros((BM, BK), tl.float32)
    at = dy + (token * H)[:, None]
    bias += index.to(tl.int64) * H
    for k0 in tl.range(0, H, BK, num_stages=3):
        k = k0 + tl.arange(0, BK)
        block = tl.load(at + k[None, :], mask=live[:, None] & (k[None, :] < H), other=0.0)
        acc += block.to(tl.float32) * tl.load(bias + k, mask=k < H, other=0.0).to(tl.float32)[None, :]
    return tl.sum(acc, 1)


@triton.jit(do_not_specialize=["begin", "num_places"])
def _routing_gradient_kernel(
    ds, zdz, dy, bias, bias_frozen, bases, tokens, places, weights, rows_TK, out, sums, table, begin, num_places,
    H: tl.constexpr, COLUMNS: tl.constexpr, PART: tl.constexpr,
    PIECES: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dS of BM rows of a tile to their places, and their four sums. The same program clears as many places."""
    piece = tl.program_id(0)
    row = tl.arange(0, BM)
    if out is not None:
        # Tiles times their height are never fewer than the places, so every place is looked at by one program.
        place = piece.to(tl.int64) * BM + row
        absent = tl.load(rows_TK + place, mask=place < num_places, other=0) < 0
        tl.store(out + place, tl.zeros((BM,), out.dtype.element_ty), mask=absent)
    tile = piece // PIECES
    slot = tl.load(table + tile * 4)
    if slot < 0:
        return
    rows = (tl.load(table + tile * 4 + 1) + piece % PIECES * BM + row).to(tl.int64)
    live = rows < tl.load(table + tile * 4 + 2)
    total = _add_columns(ds, rows, live, COLUMNS, BM, BC)
    if bias is not None:
        index, _, source = matrix(slot, bases, begin, 0, bias, bias_frozen, bias, bias_frozen, PART)
        total += _bias_product(dy, tl.load(tokens + rows, mask=live, other=0), live, source, index, H, BM, BK)
    place = tl.load(places + rows, mask=live, other=0)
    if out is not None:
        tl.store(out + place, total.to(out.dtype.element_ty), mask=live)
    if sums is not None:
        taylor = tl.where(live, tl.load(weights + place, mask=live, other=0.0).to(tl.float32) * total, 0.0)
        only = tl.arange(0, 1)
        own = tile + only.to(tl.int64)
        taylor_in = _add_columns(zdz, own, (piece % PIECES == 0) & (only == 0), COLUMNS, 1, BC)
        at = sums + piece.to(tl.int64) * 4
        tl.store(at, tl.sum(taylor, 0))
        tl.store(at + 1, tl.sum(tl.abs(taylor), 0))
        tl.store(at + 2, tl.sum(taylor * taylor, 0))
        tl.store(at + 3 + only, taylor_in)


@triton.jit(do_not_specialize=["learned"])
def _score_kernel(
    sums, squares, first_tile, offsets, out, learned,
    WIDTH: tl.constexpr, PIECES: tl.constexpr, BP: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """The six sums of one slot."""
    slot = tl.program_id(0)
    start = tl.load(first_tile + slot) * PIECES
    stop = tl.load(first_tile + slot + 1) * PIECES
    column = tl.arange(0, 4)
    acc = tl.zeros((BP, 4), tl.float32)
    for p0 in range(start, stop, BP):
        piece = p0 + tl.arange(0, BP)
        acc += tl.load(sums + piece[:, None].to(tl.int64) * 4 + column[None, :], mask=piece[:, None] < stop, other=0.0)
    square = tl.zeros((BS,), tl.float32)
    if squares is not None:
        for s0 in range(0, WIDTH, BS):
            s = s0 + tl.arange(0, BS)
            square += tl.load(squares + slot.to(tl.int64) * WIDTH + s, mask=(s < WIDTH) & (slot < learned), other=0.0)
    rows = tl.load(offsets + slot + 1) - tl.load(offsets + slot)
    tl.store(out + slot * 6, rows.to(tl.float32))
    tl.store(out + slot * 6 + 1 + column, tl.sum(acc, 0))
    tl.store(out + slot * 6 + 5, tl.sum(square, 0))


@triton.jit
def _output_norms_kernel(
    rows, tokens, places, weights, sums, table,
    H: tl.constexpr, PIECES: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The sum of |weight| * ||row|| over BM rows of a tile; by token, rows are read there and weighted already."""
    piece = tl.program_id(0)
    tile = piece // PIECES
    if tl.load(table + tile * 4) < 0:
        return
    row = (tl.load(table + tile * 4 + 1) + piece % PIECES * BM + tl.arange(0, BM)).to(tl.int64)
    live = row < tl.load(table + tile * 4 + 2)
    source = row if tokens is None else tl.load(tokens + row, mask=live, other=0)
    at = rows + (source * H)[:, None]
    acc = tl.zeros((BM, BK), tl.float32)
    for k0 in tl.range(0, H, BK, num_stages=3):
        k = k0 + tl.arange(0, BK)
        value = tl.load(at + k[None, :], mask=live[:, None] & (k[None, :] < H), other=0.0).to(tl.float32)
        acc += value * value
    norm = tl.sqrt(tl.sum(acc, 1))
    if weights is not None:
        place = tl.load(places + row, mask=live, other=0)
        norm *= tl.abs(tl.load(weights + place, mask=live, other=0.0).to(tl.float32))
    tl.store(sums + piece, tl.sum(norm, 0))


@triton.jit
def _norm_sum_kernel(sums, first_tile, out, PIECES: tl.constexpr, BP: tl.constexpr):
    """The sum over all pieces of one slot."""
    slot = tl.program_id(0)
    stop = tl.load(first_tile + slot + 1) * PIECES
    acc = tl.zeros((BP,), tl.float32)
    for p0 in range(tl.load(first_tile + slot) * PIECES, stop, BP):
        piece = p0 + tl.arange(0, BP)
        acc += tl.load(sums + piece, mask=piece < stop, other=0.0)
    tl.store(out + slot, tl.sum(acc, 0))


def _piece(schedule: Schedule) -> int:
    return min(schedule.height, _PIECE)


def tile_pieces(schedule: Schedule) -> int:
    """Return S, the rows of the partial importance sums."""
    return schedule.tiles * (schedule.height // _piece(schedule))


def routing_gradient(
    ds_RC: Tensor,
    routing: RowIndex,
    rows_TK: Tensor,
    out_TK: Tensor | None,
    *,
    schedule: Schedule,
    dy_TH: Tensor | None = None,
    bias_out: Stored | None = None,
    zdz_MC: Tensor | None = None,
    sums_S4: Tensor | None = None,
) -> list[Launch]:
    """Write dS of every place, exact zeros where it has no row, and the importance sums of every piece of a tile.

    Args:
        ds_RC: from `data_gradient`.
        routing: where the rows come from.
        rows_TK: as in `Routing`.
        out_TK: the gradient of `weights_TK`; None = not wanted.
        schedule: that of `data_gradient`.
        dy_TH, bias_out: where the experts end in a bias, its part of dS is <dy, bias_out>.
        zdz_MC: from `data_gradient`; only read for `sums_S4`.
        sums_S4: float32 (S, 4), S = `tile_pieces(schedule)`, what `score_sums` adds up; None = not wanted.
    """
    if schedule.tiles == 0:
        return []
    bm, columns = _piece(schedule), ds_RC.shape[1]
    # Without a bias H does not matter, and no dy is read.
    hidden = 0 if bias_out is None or dy_TH is None else dy_TH.shape[1]
    args = {
        "ds": ds_RC,
        "zdz": zdz_MC,
        "dy": dy_TH if hidden else None,
        "bias": None if bias_out is None else bias_out.trainable,
        "bias_frozen": None if bias_out is None else bias_out.frozen,
        "bases": None if bias_out is None else bias_out.base_of_slot_B,
        "tokens": routing.tokens_R,
        "places": routing.places_R,
        "weights": routing.weights_TK,
        "rows_TK": rows_TK,
        "out": out_TK,
        "sums": sums_S4,
        "table": schedule.table_M4,
        "begin": 0 if bias_out is None else bias_out.trainable.shape[0],
        "num_places": rows_TK.numel(),
        "H": hidden,
        "COLUMNS": columns,
        "PART": "all" if bias_out is None or bias_out.frozen is None else "both",
        "PIECES": schedule.height // bm,
        "BM": bm,
        "BK": min(128, power_of_2(max(hidden, 1))),
        "BC": min(32, power_of_2(columns)),
    }
    read = (ds_RC, zdz_MC, routing.weights_TK, routing.places_R, rows_TK, out_TK, dy_TH if hidden else None)
    moved = sum(t.nbytes for t in read if t is not None)
    flops = ds_RC.shape[0] * (columns + 2 * hidden)
    return [Launch(_routing_gradient_kernel, (tile_pieces(schedule),), args, 4, 3, flops, moved)]


def score_sums(
    sums_S4: Tensor, offsets_B1: Tensor, out_B6: Tensor, *, schedule: Schedule, squares_GN: Tensor | None = None
) -> list[Launch]:
    """Write the importance of every slot, the first six of `ExpertScores`; zeros where a slot has no row.

    Args:
        sums_S4: from `routing_gradient`.
        offsets_B1: as in `Routing`.
        out_B6: float32 (B, 6).
        schedule: that of `routing_gradient`.
        squares_GN: float32, contiguous, from `weight_gradient`, all matrices of a slot side by side; slots from G on
            have no weight gradient and score 0 there. None = no slot has one.
    """
    width = 0 if squares_GN is None else squares_GN.shape[1]
    args = {
        "sums": sums_S4,
        "squares": squares_GN,
        "first_tile": schedule.first_tile_B1,
        "offsets": offsets_B1,
        "out": out_B6,
        "learned": 0 if squares_GN is None else squares_GN.shape[0],
        "WIDTH": width,
        "PIECES": schedule.height // _piece(schedule),
        "BP": 128,
        "BS": min(1024, power_of_2(max(width, 1))),
    }
    moved = sums_S4.nbytes + (0 if squares_GN is None else squares_GN.nbytes) + out_B6.nbytes
    return [Launch(_score_kernel, (out_B6.shape[0],), args, 4, 1, 0, moved)]


def output_norms(
    rows_XH: Tensor, routing: RowIndex, sums_S: Tensor, out_B: Tensor, *, schedule: Schedule, by_token: bool
) -> list[Launch]:
    """Write each slot's sum of |weight| * ||output|| over its rows, 0 where it has none: two launches.

    Args:
        rows_XH: from `down`: by row and not yet weighted, or (T, H) `by_token` and weighted.
        routing: where the rows come from.
        sums_S: float32 (S,), S = `tile_pieces(schedule)`, room for the sums of every piece of a tile.
        out_B: float32 (B,).
        schedule: that of `down`.
        by_token: see `rows_XH`.
    """
    bm, hidden = _piece(schedule), rows_XH.shape[1]
    args = {
        "rows": rows_XH,
        "tokens": routing.tokens_R if by_token else None,
        "places": None if by_token else routing.places_R,
        "weights": None if by_token else routing.weights_TK,
        "sums": sums_S,
        "table": schedule.table_M4,
        "H": hidden,
        "PIECES": schedule.height // bm,
        "BM": bm,
        "BK": min(128, power_of_2(hidden)),
    }
    total = {"sums": sums_S, "first_tile": schedule.first_tile_B1, "out": out_B, "PIECES": args["PIECES"], "BP": 128}
    moved, flops = rows_XH.nbytes + routing.places_R.nbytes + routing.weights_TK.nbytes, 2 * rows_XH.numel()
    return [
        Launch(_output_norms_kernel, (sums_S.shape[0],), args, 4, 3, flops, moved),
        Launch(_norm_sum_kernel, (out_B.shape[0],), total, 4, 1, 0, sums_S.nbytes + out_B.nbytes),
    ]
