"""The gradient of each row's pre-activation, with all else that one look at it gives: dS, s * h and importance sums.

Shapes: T tokens, K top-k, R places of which the first N are rows, B slots, M tiles, C column blocks of a row, H hidden,
I intermediate, F = 2 * I for gated activations and I for the others.

With s the routing weight of a row and d = dy @ W_out, the gradient of h before that weight:
    dz = s * d * f'(z)      dS = <d, h> (+ <dy, b_out>, which `row_sums` adds)      sh = s * h
so neither the experts' outputs nor h are ever stored, and <z, dz> is the row's first-order importance.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fedmoe_kernels.activations import ACTIVATIONS
from fedmoe_kernels.configs import Tile
from fedmoe_kernels.gpu.activate import slopes
from fedmoe_kernels.gpu.blocks import matrix, position, row_block, tile_rows, weight_block
from fedmoe_kernels.gpu.launch import Launch, row_constants
from fedmoe_kernels.gpu.schedule import Schedule
from fedmoe_kernels.gpu.storage import RankTerm, RowIndex, Stored


@triton.jit
def _pieces(block, M: tl.constexpr, N: tl.constexpr, COUNT: tl.constexpr):
    """The block (M, N) as COUNT blocks of N / COUNT columns, in order; no value changes its thread."""
    if COUNT == 1:
        return (block,)
    else:
        left, right = block.reshape(M, 2, N // 2).permute(0, 2, 1).split()
        return _pieces(left, M, N // 2, COUNT // 2) + _pieces(right, M, N // 2, COUNT // 2)


@triton.jit
def _send_back(
    d, s, z, dz, sh, live, n0,
    I: tl.constexpr, HALVES: tl.constexpr, ACTIVATION: tl.constexpr, WHOLE: tl.constexpr,  # noqa: E741
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Columns n0..n0 + N - 1 of a tile: dz and sh are written; its parts of <d, h> and <z, dz> come back by row."""
    n = n0 + tl.arange(0, N)
    kept = live[:, None]
    if not WHOLE:
        kept &= n[None, :] < I
    # z, dz and sh point at the tile's first row, so that offsets within it fit 32 bits and cost half the registers.
    row = tl.arange(0, M)[:, None]
    at = row * (HALVES * I) + n[None, :]
    gate = tl.load(z + at, mask=kept, other=0.0).to(tl.float32)
    up = gate
    if HALVES == 2:
        up = tl.load(z + at + I, mask=kept, other=0.0).to(tl.float32)
    h, dgate, dup = slopes(gate, up, d, ACTIVATION)
    # What is masked may still be NaN: 0 * inf where a weight or a token overflowed.
    ds = tl.sum(tl.where(kept, d * h, 0.0), 1)
    dgate *= s[:, None]
    zdz = gate * dgate
    if dz is not None:
        tl.store(dz + at, dgate.to(dz.dtype.element_ty), mask=kept)
    if HALVES == 2:
        dup *= s[:, None]
        zdz += up * dup
        if dz is not None:
            tl.store(dz + at + I, dup.to(dz.dtype.element_ty), mask=kept)
    if sh is not None:
        tl.store(sh + row * I + n[None, :], (h * s[:, None]).to(sh.dtype.element_ty), mask=kept)
    return ds, tl.sum(tl.where(kept, zdz, 0.0), 1)


@triton.jit(do_not_specialize=["tiles", "trainable", "steps"])
def _data_gradient_kernel(
    dy, tokens, places, weights, w, w_frozen, bases, z, dz, sh, ds, zdz, table, tiles, trainable, steps,
    H: tl.constexpr, I: tl.constexpr, ACTIVATION: tl.constexpr, HALVES: tl.constexpr, PART: tl.constexpr,  # noqa: E741
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of BM rows by BN columns of d = dy[tokens] @ w, w (X, H, I), sent back through the activation.

    The epilogue runs in SPLIT pieces: as one, 128 x 128 blocks spill over 1 KB a thread.
    """
    COLUMNS: tl.constexpr = (I + BN - 1) // BN
    tile, column = position(tl.program_id(0), tiles, COLUMNS, GROUP)
    slot, first, rows, live = tile_rows(table, tile, BM)
    if slot < 0:
        return
    index, source, _ = matrix(slot, bases, trainable, w, w_frozen, None, None, PART)
    n0 = column * BN
    token = tl.load(tokens + rows, mask=live, other=0)
    d = tl.zeros((BM, BN), tl.float32)
    for step in range(steps):
        left = row_block(dy, token, live, first, step * BK, H, BK, False)
        right = weight_block(source, index, n0, step * BK, I, H, BN, BK, True, TMA)
        d = tl.dot(left, right, d, input_precision=PRECISION)

    place = tl.load(places + rows, mask=live, other=0)
    s = tl.load(weights + place, mask=live, other=0.0).to(tl.float32)
    start = first.to(tl.int64)
    z += start * (HALVES * I)
    if dz is not None:
        dz += start * (HALVES * I)
    if sh is not None:
        sh += start * I
    pieces = _pieces(d, BM, BN, SPLIT)
    WIDTH: tl.constexpr = BN // SPLIT
    WHOLE: tl.constexpr = I % BN == 0
    ds_rows = tl.zeros((BM,), tl.float32)
    zdz_rows = tl.zeros((BM,), tl.float32)
    for i in tl.static_range(SPLIT):
        ds_part, zdz_part = _send_back(
            pieces[i], s, z, dz, sh, live, n0 + i * WIDTH, I, HALVES, ACTIVATION, WHOLE, BM, WIDTH
        )
        ds_rows += ds_part
        zdz_rows += zdz_part
    if ds is not None:
        tl.store(ds + rows * COLUMNS + column, ds_rows, mask=live)
    if zdz is not None:
        # Two-dimensional to the end: sums of one-dimensional blocks crash Triton 3.7 on sm_100 beside a product.
        tl.store(zdz + tile * COLUMNS + column + tl.arange(0, 1), tl.sum(zdz_rows.reshape(1, BM), 1))


def column_blocks(intermediate: int, tile: Tile) -> int:
    """C, how many partial sums `data_gradient` leaves per row and per tile."""
    return triton.cdiv(intermediate, tile.n)


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
        activation: a name of `activations.ACTIVATIONS`.
        schedule: of these rows, with blocks of `tile.m`.
        tile: sizes of the blocks; `tile.split` is a power of two.
        term: what adapters add to d.
    """
    if schedule.tiles == 0:
        return []
    halves = 2 if ACTIVATIONS[activation].gated else 1
    rows, hidden, inner = z_RF.shape[0], dy_TH.shape[1], z_RF.shape[1] // halves
    tma = tile.tma and w_out.describable
    args = {
        "dy": dy_TH,
        "tokens": routing.tokens_R,
        "places": routing.places_R,
        "weights": routing.weights_TK,
        **(w_out.descriptors("w", (tile.k, tile.n)) if tma else w_out.pointers("w")),
        "bases": w_out.base_of_slot_B,
        "z": z_RF,
        "dz": dz_RF,
        "sh": sh_RI,
        "ds": ds_RC,
        "zdz": zdz_MC,
        "table": schedule.table_M4,
        "tiles": schedule.tiles,
        "trainable": w_out.trainable.shape[0],
        "steps": triton.cdiv(hidden, tile.k),
        "H": hidden,
        "I": inner,
        "ACTIVATION": activation,
        "HALVES": halves,
        "PART": w_out.part,
        "SPLIT": tile.split,
        **row_constants(tile, dy_TH.dtype, tma=tma),
    }
    grid = (schedule.tiles * column_blocks(inner, tile),)
    moved = w_out.nbytes + sum(t.nbytes for t in (dy_TH, z_RF, dz_RF, sh_RI, ds_RC, zdz_MC) if t is not None)
    return [
        Launch(_data_gradient_kernel, grid, args, tile.warps, tile.stages, 2 * rows * hidden * inner, moved),
    ]
