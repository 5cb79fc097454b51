"""Products of rows with their slot's matrix: the down-projection, the gradient of x by row, adapters' rank-sized rows.

Shapes: T tokens, K top-k, R places of which the first N are rows, B slots, Bt trainable slots, Bl slots with an
adapter, H hidden, I intermediate, F = 2 * I for gated activations and I for the others, r rank. Inside the kernel N
and K are the columns and the depth of the product.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fedmoe_kernels.gpu.blocks import bias_block, matrix, position, row_block, store_block, tile_rows, weight_block
from fedmoe_kernels.gpu.experts.decode import decoded_block, scale_block
from fedmoe_kernels.gpu.experts.persistent import persistent
from fedmoe_kernels.gpu.experts.schedule import Schedule
from fedmoe_kernels.gpu.experts.storage import Direct, Part, Product, RankTerm, Stored, describable, term_arguments
from fedmoe_kernels.gpu.launch import Launch, TensorDescriptor, cdiv, power_of_2
from fedmoe_kernels.tiles.lookup import Tile


@triton.jit
def sums_of_rows(
    a, read, rows, live, first, w, scale, whole, index, n0, steps, rank_rows, factor, adapter_scale, slot, adapters,
    N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TRANSPOSED: tl.constexpr,
    RANK: tl.constexpr, CHUNK: tl.constexpr, FORMAT: tl.constexpr, SHARE: tl.constexpr, TALL: tl.constexpr,
    TMA: tl.constexpr, TMA_ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block (BM, BN) of a @ w^T, w (X, N, K) or (X, K, N), plain or in codes, and of what the slot's adapter adds."""
    acc = tl.zeros((BM, BN), tl.float32)
    if RANK > 0 and slot < adapters:
        # First, not last: the term needs no second block of sums beside the product's.
        for r0 in tl.static_range(0, RANK, CHUNK):
            left = row_block(rank_rows, rows, live, first, r0, RANK, CHUNK, False)
            right = weight_block(factor, slot, n0, r0, N, RANK, BN, CHUNK, TRANSPOSED, False)
            acc = tl.dot(left, right, acc, input_precision=PRECISION)
        acc *= tl.load(adapter_scale + slot).to(tl.float32)
    if FORMAT != "":
        stored = scale_block(scale, index, n0, 0, N, K, BN, BK, TRANSPOSED, SHARE, TALL)
    for step in range(steps):
        left = row_block(a, read, live, first, step * BK, K, BK, TMA_ROWS)
        if FORMAT != "":
            ahead = scale_block(scale, index, n0, (step + 1) * BK, N, K, BN, BK, TRANSPOSED, SHARE, TALL)
            wide = decoded_block(w, stored, whole, index, n0, step * BK, N, K, BN, BK, TRANSPOSED, SHARE, FORMAT)
            right, stored = wide.to(left.dtype), ahead
        else:
            right = weight_block(w, index, n0, step * BK, N, K, BN, BK, TRANSPOSED, TMA)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _clear_absent(
    out, rows_TK, block, tokens, columns, CHOICES: tl.constexpr, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Write zeros to the tokens of block `block`, BM each, that have no row at any place."""
    token = block.to(tl.int64) * BM + tl.arange(0, BM)
    absent = token < tokens
    for j in tl.static_range(CHOICES):
        absent &= tl.load(rows_TK + token * CHOICES + j, mask=absent, other=0) < 0
    for column in range(columns):
        store_block(out, token, absent, column * BN, tl.zeros((BM, BN), tl.float32), N, N, BN, N % BN == 0)


@triton.jit(do_not_specialize=["tiles", "begin", "stop", "steps", "adapters", "num_tokens", "columns"])
def _rows_kernel(
    a, gather, w, w_frozen, scale, whole, bias, bias_frozen, bases, rank_rows, factor, adapter_scale,
    out, targets, places, weights, rows_TK, table, tiles, begin, stop, steps, adapters, num_tokens, columns,
    N: tl.constexpr, K: tl.constexpr, TRANSPOSED: tl.constexpr, PART: tl.constexpr, CHOICES: tl.constexpr,
    RANK: tl.constexpr, CHUNK: tl.constexpr, FORMAT: tl.constexpr, SHARE: tl.constexpr, TALL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    TMA: tl.constexpr, TMA_ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of BM rows by BN columns of a @ w^T + bias, a's rows in order or gathered, w (X, N, K) or (X, K, N).

    With `targets` the rows go there, times their weight, and programs past the tiles clear the tokens without a row.
    """
    COLUMNS: tl.constexpr = (N + BN - 1) // BN
    program = tl.program_id(0)
    if targets is not None and program >= tiles * COLUMNS:
        _clear_absent(out, rows_TK, program - tiles * COLUMNS, num_tokens, columns, CHOICES, N, BM, BN)
        return
    tile, column = position(program, tiles, COLUMNS, GROUP)
    slot, first, rows, live = tile_rows(table, tile, BM)
    if slot < 0:
        return
    index, source, source_bias = matrix(slot, bases, begin, stop, w, w_frozen, bias, bias_frozen, PART)
    if index < 0:
        return
    if whole is not None:
        whole = tl.load(whole + index)
    n0 = column * BN
    # Rows in order are counted from the tile's first, so that offsets fit 32 bits, which cost half the registers.
    start, row = first.to(tl.int64), tl.arange(0, BM)
    if gather is not None:
        read = tl.load(gather + rows, mask=live, other=0)
    else:
        read = row
        if not TMA_ROWS:
            a += start * K
    acc = sums_of_rows(
        a, read, rows, live, first, source, scale, whole, index, n0, steps, rank_rows, factor, adapter_scale, slot,
        adapters, N, K, BM, BN, BK, TRANSPOSED, RANK, CHUNK, FORMAT, SHARE, TALL, TMA, TMA_ROWS, PRECISION,
    )  # fmt: skip
    if bias is not None:
        acc += bias_block(source_bias, index, n0, N, BN, N % BN == 0)
    if targets is not None:
        if weights is not None:
            weight = tl.load(weights + tl.load(places + rows, mask=live, other=0), mask=live, other=0.0)
            acc *= weight.to(tl.float32)[:, None]
        target = tl.load(targets + rows, mask=live, other=0)
        store_block(out, target, live, n0, acc, N, N, BN, N % BN == 0)
    else:
        store_block(out + start * N, row, live, n0, acc, N, N, BN, N % BN == 0)


def down(
    h_RI: Tensor,
    w_out: Stored,
    bias_out: Stored | None,
    out_XH: Tensor,
    *,
    schedule: Schedule,
    tile: Tile,
    direct: Direct | None = None,
    term: RankTerm | None = None,
) -> list[Launch]:
    """Write out = h @ w_out^T + bias_out of each row's slot.

    Args:
        h_RI: the activations; rows from N on are never used.
        w_out: (B, H, I).
        bias_out: (B, H).
        out_XH: (R, H) by row, of which rows from N on are left alone; (T, H) by token with `direct`.
        schedule: of these rows, with blocks of `tile.m`.
        tile: sizes of the blocks.
        direct: where every token has at most one row: write weight * row to the token.
        term: what adapters add.
    """
    return _launches(_Rows(h_RI, w_out.parts, bias_out, out_XH, False, direct=direct, term=term), schedule, tile)


def input_gradient(
    dz_RF: Tensor,
    w_in: Stored,
    out_XH: Tensor,
    *,
    schedule: Schedule,
    tile: Tile,
    direct: Direct | None = None,
    term: RankTerm | None = None,
) -> list[Launch]:
    """Write out = dz @ w_in of each row's slot, w_in (B, F, H); the rest as in `down`."""
    return _launches(_Rows(dz_RF, w_in.parts, None, out_XH, True, direct=direct, term=term), schedule, tile)


def rank_product(
    rows_XK: Tensor,
    factor: Tensor,
    out_Rr: Tensor,
    *,
    transposed: bool,
    tokens_R: Tensor | None,
    schedule: Schedule,
    tile: Tile,
) -> list[Launch]:
    """Write rows @ factor^T with factor (Bl, r, K), or rows @ factor with factor (Bl, K, r) if `transposed`.

    Rows of slots from Bl on, which have no adapter, are left alone. With `tokens_R` rows_XK is read by token.
    """
    width = max(16, power_of_2(out_Rr.shape[1]))
    parts = [Part("some", 0, factor.shape[0], factor)]
    product = _Rows(rows_XK, parts, None, out_Rr, transposed, gather=tokens_R)
    return _launches(product, schedule, replace(tile, n=min(tile.n, width)))


class _Rows(NamedTuple):
    """rows @ w^T + bias, or rows @ w if `transposed`, into `out`; rows in order or gathered."""

    rows_XK: Tensor
    parts: list[Part]
    bias: Stored | None
    out_XN: Tensor
    transposed: bool
    gather: Tensor | None = None
    direct: Direct | None = None
    term: RankTerm | None = None


def _launches(asked: _Rows, schedule: Schedule, tile: Tile) -> list[Launch]:
    """Make the launches of all parts; with `direct` the last one also clears the tokens without a row."""
    rows_XK, parts, bias, out_XN, transposed, gather, direct, term = asked
    rows, K, N = (rows_XK if gather is None else gather).shape[0], rows_XK.shape[1], out_XN.shape[1]
    described = tile.tma and gather is None and describable(rows_XK)
    common: dict[str, Any] = {
        "gather": gather,
        "out": out_XN,
        "table": schedule.table_M4,
        "tiles": schedule.tiles,
        **term_arguments(term),
        **dict.fromkeys(("targets", "places", "weights", "rows_TK"), None),
        "num_tokens": 0,
        "CHOICES": 1,
        "N": N,
        "K": K,
        "TRANSPOSED": transposed,
        "TMA_ROWS": described,
    }
    if direct is not None:
        tokens, choices = direct.rows_TK.shape
        common |= {"targets": direct.tokens_R, "places": direct.places_R, "weights": direct.weights_TK}
        common |= {"rows_TK": direct.rows_TK, "num_tokens": tokens, "CHOICES": choices}

    def own(part: Part, cut: Tile) -> dict[str, Any]:
        a = TensorDescriptor.from_tensor(rows_XK, [cut.m, cut.k]) if described else rows_XK
        return {"a": a, **part.biases(bias), "columns": cdiv(N, cut.n)}

    product = Product(parts, rows, N, K, rows_XK.dtype, rows_XK.nbytes + out_XN.nbytes, transposed)
    found = product.launches(_rows_kernel, schedule.tiles, tile, common, own)
    if found and direct is not None:
        found[-1] = replace(found[-1], grid=(found[-1].grid[0] + cdiv(tokens, tile.m),))
    if tile.persistent and described and direct is None and term is None:
        return [
            persistent(one, schedule) if one.args.get("TMA") and one.args["PART"] != "some" else one for one in found
        ]
    return found
