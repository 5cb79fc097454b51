"""The gradient of each row's pre-activation, with all else that one look at it gives: dS, s * h and importance sums.

Shapes: T tokens, K top-k, R places of which the first N are rows, B slots, M tiles, C column blocks of a row, H hidden,
I intermediate, F = 2 * I for gated activations and I for the others, r rank.

With s the routing weight of a row and d = dy @ W_out, the gradient of h before that weight:
    dz = s * d * f'(z)      dS = <d, h> (+ <dy, b_out>, which `row_sums` adds)      sh = s * h
so neither the experts' outputs nor h are ever stored, and <z, dz> is the row's first-order importance.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fedmoe_kernels.activations import ACTIVATIONS, parts
from fedmoe_kernels.gpu.blocks import matrix, pieces, position, tile_rows
from fedmoe_kernels.gpu.experts.activate import slopes
from fedmoe_kernels.gpu.experts.down import sums_of_rows
from fedmoe_kernels.gpu.experts.schedule import Schedule
from fedmoe_kernels.gpu.experts.storage import Product, RankTerm, RowIndex, Stored, decoding_tile, term_arguments
from fedmoe_kernels.gpu.launch import Launch, cdiv
from fedmoe_kernels.tiles.lookup import Tile


@triton.jit
def _inside(live, n0, I: tl.constexpr, N: tl.constexpr, WHOLE: tl.constexpr):  # noqa: E741
    """Which elements of columns n0..n0 + N - 1 exist: (M, N), or (M, 1) where columns are inside or outside as one.

    WHOLE = no column lies outside.
    """
    if WHOLE:
        return live[:, None]
    elif I % N == 0:
        return (live & (n0 < I))[:, None]
    else:
        return live[:, None] & ((n0 + tl.arange(0, N))[None, :] < I)


@triton.jit
def _load_piece(
    z, live, n0,
    I: tl.constexpr, HALVES: tl.constexpr, M: tl.constexpr, N: tl.constexpr, WHOLE: tl.constexpr,  # noqa: E741
):  # fmt: skip
    """(gate, up) of a piece as they are stored; without a gate, the same block twice."""
    kept = _inside(live, n0, I, N, WHOLE)
    at = z + tl.arange(0, M)[:, None] * (HALVES * I) + (n0 + tl.arange(0, N))[None, :]
    gate = tl.load(at, mask=kept, other=0.0)
    up = gate
    if HALVES == 2:
        up = tl.load(at + I, mask=kept, other=0.0)
    return gate, up


@triton.jit
def _row_sum(block, n0, I: tl.constexpr, N: tl.constexpr, WHOLE: tl.constexpr):  # noqa: E741
    """The sum of each row over the columns that exist. Others may be NaN: 0 * inf where a token overflowed."""
    if WHOLE:
        return tl.sum(block, 1)
    elif I % N == 0:
        return tl.where(n0 < I, tl.sum(block, 1), 0.0)
    else:
        return tl.sum(tl.where((n0 + tl.arange(0, N))[None, :] < I, block, 0.0), 1)


@triton.jit
def _send_back(
    d, s, gate, up, dz, sh, live, n0,
    I: tl.constexpr, HALVES: tl.constexpr, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr,  # noqa: E741
    M: tl.constexpr, N: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Columns n0..n0 + N - 1 of a tile: dz and sh are written; its parts of <d, h> and <z, dz> come back by row."""
    kept = _inside(live, n0, I, N, WHOLE)
    # dz and sh point at the tile's first row, so that offsets within it fit 32 bits and cost half the registers.
    row, n = tl.arange(0, M)[:, None], (n0 + tl.arange(0, N))[None, :]
    gate, up = gate.to(tl.float32), up.to(tl.float32)
    h, dgate, dup = slopes(gate, up, d * s[:, None], ACTIVATION, LIMIT)
    if dz is not None:
        at = dz + row * (HALVES * I) + n
        tl.store(at, dgate.to(dz.dtype.element_ty), mask=kept)
        if HALVES == 2:
            tl.store(at + I, dup.to(dz.dtype.element_ty), mask=kept)
    if sh is not None:
        tl.store(sh + row * I + n, (h * s[:, None]).to(sh.dtype.element_ty), mask=kept)
    zdz = gate * dgate
    if HALVES == 2:
        zdz += up * dup
    return _row_sum(d * h, n0, I, N, WHOLE), _row_sum(zdz, n0, I, N, WHOLE)


@triton.jit(do_not_specialize=["tiles", "begin", "stop", "steps", "adapters"])
def _data_gradient_kernel(
    dy, tokens, places, weights, w, w_frozen, scale, whole, bases, rank_rows, factor, adapter_scale,
    z, dz, sh, ds, zdz, table, tiles, begin, stop, steps, adapters,
    H: tl.constexpr, I: tl.constexpr, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr, HALVES: tl.constexpr,  # noqa: E741
    PART: tl.constexpr, RANK: tl.constexpr, CHUNK: tl.constexpr, FORMAT: tl.constexpr, SHARE: tl.constexpr,
    TALL: tl.constexpr, SUMS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, SPLIT: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of BM rows by BN columns of d = dy[tokens] @ w, w (X, H, I), sent back through the activation.

    The epilogue runs in SPLIT pieces: as one, 128 x 128 blocks spill over 1 KB a thread. Each piece's z is on its way
    while the piece before it is computed. Partial sums have SUMS columns, of which this launch may fill fewer.
    """
    COLUMNS: tl.constexpr = (I + BN - 1) // BN
    tile, column = position(tl.program_id(0), tiles, COLUMNS, GROUP)
    slot, first, rows, live = tile_rows(table, tile, BM)
    if slot < 0:
        return
    index, source, _ = matrix(slot, bases, begin, stop, w, w_frozen, w, w_frozen, PART)
    if index < 0:
        return
    if whole is not None:
        whole = tl.load(whole + index)
    n0 = column * BN
    token = tl.load(tokens + rows, mask=live, other=0)
    place = tl.load(places + rows, mask=live, other=0)
    s = tl.load(weights + place, mask=live, other=0.0).to(tl.float32)
    d = sums_of_rows(
        dy, token, rows, live, first, source, scale, whole, index, n0, steps, rank_rows, factor, adapter_scale, slot,
        adapters, I, H, BM, BN, BK, True, RANK, CHUNK, FORMAT, SHARE, TALL, TMA, False, PRECISION,
    )  # fmt: skip

    N: tl.constexpr = BN // SPLIT
    WHOLE: tl.constexpr = I % BN == 0
    start = first.to(tl.int64)
    z += start * (HALVES * I)
    if dz is not None:
        dz += start * (HALVES * I)
    if sh is not None:
        sh += start * I
    gate, up = _load_piece(z, live, n0, I, HALVES, BM, N, WHOLE)
    parts = pieces(d, BM, BN, SPLIT)
    ds_rows = tl.zeros((BM,), tl.float32)
    zdz_rows = tl.zeros((BM,), tl.float32)
    for i in tl.static_range(SPLIT):
        gate_now, up_now = gate, up
        if i + 1 < SPLIT:
            gate, up = _load_piece(z, live, n0 + (i + 1) * N, I, HALVES, BM, N, WHOLE)
        ds_part, zdz_part = _send_back(
            parts[i], s, gate_now, up_now, dz, sh, live, n0 + i * N, I, HALVES, ACTIVATION, LIMIT, BM, N, WHOLE
        )
        ds_rows += ds_part
        zdz_rows += zdz_part
    zdz_rows = tl.where(live, zdz_rows, 0.0)
    _store_sums(ds, zdz, ds_rows, zdz_rows, rows, live, tile, column, SUMS, BM)
    for c in tl.static_range(COLUMNS, SUMS, COLUMNS):
        # Another launch has more, narrower blocks, and all rows have as many sums: the rest are 0.
        if column + c < SUMS:
            nothing = tl.zeros((BM,), tl.float32)
            _store_sums(ds, zdz, nothing, nothing, rows, live, tile, column + c, SUMS, BM)


@triton.jit
def _store_sums(ds, zdz, ds_rows, zdz_rows, rows, live, tile, column, SUMS: tl.constexpr, BM: tl.constexpr):
    if ds is not None:
        tl.store(ds + rows * SUMS + column, ds_rows, mask=live)
    if zdz is not None:
        # Two-dimensional to the end: sums of one-dimensional blocks crash Triton 3.7 on sm_100 beside a product.
        tl.store(zdz + tile * SUMS + column + tl.arange(0, 1), tl.sum(zdz_rows.reshape(1, BM), 1))


def column_blocks(intermediate: int, tile: Tile, w_out: Stored) -> int:
    """Return C, the number of partial sums `data_gradient` leaves per row and tile: the most of its launches."""
    return max(cdiv(intermediate, decoding_tile(tile, part, transposed=True).n) for part in w_out.parts)


def data_gradient(
    dy_TH: Tensor,
    z_RF: Tensor,
    routing: RowIndex,
    w_out: Stored,
    *,
    dz_RF: Tensor | None,
    sh_RI: Tensor | None,
    ds_RC: Tensor | None,
    zdz_MC: Tensor | None,
    activation: str,
    schedule: Schedule,
    tile: Tile,
    term: RankTerm | None = None,
) -> list[Launch]:
    """Send dy back to each row's pre-activation. Rows from N on, and partial sums of unused tiles, are left alone.

    Args:
        dy_TH: gradient of the layer's output.
        z_RF: pre-activations, with their bias.
        routing: where the rows come from.
        w_out: (B, H, I).
        dz_RF: gradient of z; None = not wanted.
        sh_RI: s * h, the right operand of dW_out = dy^T @ sh; None = not wanted.
        ds_RC: float32 partial sums of <d, h> by row and column block; None = not wanted.
        zdz_MC: float32 partial sums of <z, dz>, before rounding, by tile and column block; None = not wanted.
        activation: a name as `activations.parts` takes it.
        schedule: of these rows, with blocks of `tile.m`.
        tile: sizes of the blocks; `tile.split` is a power of two.
        term: what adapters add to d.
    """
    name, limit = parts(activation)
    halves = 2 if ACTIVATIONS[name].gated else 1
    rows, hidden, inner = z_RF.shape[0], dy_TH.shape[1], z_RF.shape[1] // halves
    common: dict[str, Any] = {
        "dy": dy_TH,
        "tokens": routing.tokens_R,
        "places": routing.places_R,
        "weights": routing.weights_TK,
        "z": z_RF,
        "dz": dz_RF,
        "sh": sh_RI,
        "ds": ds_RC,
        "zdz": zdz_MC,
        "table": schedule.table_M4,
        "tiles": schedule.tiles,
        "H": hidden,
        "I": inner,
        "ACTIVATION": name,
        "LIMIT": limit,
        "HALVES": halves,
        "SUMS": column_blocks(inner, tile, w_out),
        **term_arguments(term),
    }
    moved = sum(t.nbytes for t in (dy_TH, z_RF, dz_RF, sh_RI, ds_RC, zdz_MC) if t is not None)
    product = Product(w_out.parts, rows, inner, hidden, dy_TH.dtype, moved, transposed=True)
    return product.launches(
        _data_gradient_kernel, schedule.tiles, tile, common, lambda _part, cut: {"SPLIT": cut.split}
    )
