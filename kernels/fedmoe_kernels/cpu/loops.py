"""The experts as loops over slots: rows gathered in tiles, one product per slot and stage, results written in place.

Shapes: T tokens, K top-k, B slots, G slots with gradient buffers, R = T * K places, N <= R rows, H hidden,
I intermediate, F = 2 * I when gated else I, C rows of a tile. Sums run in a fixed order: a rerun with as many threads
gives the same bits. Places without a row are never read: N rows are all that the loops know.

The path of CPU tensors, and of tensors on a GPU that the kernels cannot serve, where torch.mm makes the products.

Memory: y or dx of all rows before they are combined, one tile's buffers, what one oneDNN product allocates (gemm.py),
and the results; see `forward_bytes` and `backward_bytes`. Nothing else grows with the rows but some bytes of index.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedmoe_kernels.activations import Activation
from fedmoe_kernels.cpu import slot
from fedmoe_kernels.cpu.gemm import Gemm, gemm_for, most_slack
from fedmoe_kernels.cpu.slot import Expert, Gradients

# Values per (C, I) buffer of a tile: 1 MB of float32 keeps the passes between two products in cache, and leaves the
# products long enough (256 rows at I = 1024) for their full rate.
_TILE_VALUES = 2**18
# Norms of gradients: rows taken at once (4 kB of float32; one slot at least), values that short rows are joined to, and
# values in half precision that are made float32 at once (64 kB).
_NORM_ROWS = 2**10
_NORM_ROW = 2**9
_NORM_VALUES = 2**14


class HostRows(NamedTuple):
    """Where each row comes from: the tensors of `Routing`, with the slots' bounds on the host."""

    weights_TK: Tensor
    rows_TK: Tensor
    tokens_R: Tensor
    places_R: Tensor
    offsets: list[int]

    @property
    def real(self) -> int:
        """N, the real rows."""
        return self.offsets[-1]


class _Piece(NamedTuple):
    """Rows start..stop - 1, all of slot `slot`; `first` when they are the first rows of that slot."""

    expert: Expert
    slot: int
    start: int
    stop: int
    first: bool


class _Tile(NamedTuple):
    """Rows low..high - 1, as the pieces of the slots that they belong to, each with its place in the tile's buffers."""

    low: int
    high: int
    pieces: list[tuple[_Piece, slice]]


def tile_rows(intermediate: int) -> int:
    """Return C, the most rows that are worked on at once."""
    return max(64, _TILE_VALUES // max(1, intermediate))


def forward_bytes(
    tokens: int, rows: int, hidden: int, inner: int, *, gated: bool, itemsize: int = 4, keep_z: bool = True
) -> int:
    """Return the most bytes that a forward allocates at once, for any routing of R = `rows` places.

    Of these the saved z (R * F values, with `keep_z`) and y (T * H) stay. Exact to 64 kB (oneDNN's scratch) when one
    slot fills a tile; other routings take less. A quantised slot adds one dequantised matrix and its codes as floats.
    """
    width = 2 * inner if gated else inner
    most, room = _room(rows, inner)
    combining = tokens * hidden + 4 * rows + 4 * tokens  # 8-byte indices counted in values of 4
    working = room * (hidden + inner) + (most + most_slack(most)) * max(width, hidden)
    z = rows if keep_z else most
    return itemsize * (z * width + (rows + 1) * hidden + max(working, combining))


def backward_bytes(
    tokens: int,
    rows: int,
    hidden: int,
    inner: int,
    *,
    gated: bool,
    grad_slots: int,
    itemsize: int = 4,
    recompute: bool = False,
) -> int:
    """Return the most bytes that a backward allocates at once, all gradients asked for.

    Of these the weight gradients (G * (F + I) * H values) and dx (T * H) stay. Exact in the same sense. To recompute z
    takes one tile of it, C * F values, and the product that makes it. 16 bytes a row are its token and place, which
    are not kept from the forward on.
    """
    width = 2 * inner if gated else inner
    most, room = _room(rows, inner)
    combining = tokens * hidden + 4 * rows + 4 * tokens
    working = room * (hidden + 2 * inner + width) + most * width + hidden * width
    if recompute:
        working += most * width
    weights = grad_slots * (width + inner) * hidden
    return 16 * rows + itemsize * (weights + (rows + 1) * hidden + 3 * rows + max(working, combining))


def forward(
    x_TH: Tensor,
    rows: HostRows,
    experts: Sequence[Expert],
    activation: Activation,
    *,
    keep_z: bool,
    want_reap: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute y (T, H), the pre-activations z (R, F) that the backward reads, and each slot's REAP sum, float32 (B,).

    z is (0, F) without `keep_z`, and the sums (0,) without `want_reap`.
    """
    width = activation.width(experts[0].w_out.shape[1])
    z_RF = x_TH.new_empty(rows.tokens_R.shape[0] if keep_z else 0, width)
    if rows.real == 0:
        return torch.zeros_like(x_TH), z_RF, x_TH.new_zeros(len(experts) if want_reap else 0, dtype=torch.float32)
    y_XH = _rows_and_zero(rows, x_TH)
    _forward_tiles(x_TH, rows, experts, activation, z_RF=z_RF if keep_z else None, y_XH=y_XH)
    reap_B = _reap(y_XH, rows) if want_reap else x_TH.new_empty(0, dtype=torch.float32)
    return _combine(y_XH, rows, weighted=True), z_RF, reap_B


def _reap(y_XH: Tensor, rows: HostRows) -> Tensor:
    """Sum |s| * ||y|| over the rows of each slot, float32 (B,); halves are made float32 a few rows at a time."""
    step = rows.real if y_XH.dtype.itemsize > 2 else max(1, _NORM_VALUES // y_XH.shape[1])
    wide = torch.float64 if y_XH.dtype == torch.float64 else torch.float32
    norm_N = torch.cat([torch.linalg.vector_norm(y_nH.to(wide), dim=1) for y_nH in y_XH[: rows.real].split(step)])
    s_N = rows.weights_TK.flatten().index_select(0, rows.places_R[: rows.real])
    offsets_B1 = torch.tensor(rows.offsets, device=y_XH.device)
    term_N = s_N.abs().double() * norm_N
    return torch.segment_reduce(term_N, "sum", offsets=offsets_B1, axis=0, unsafe=True, initial=0).float()


def _forward_tiles(
    x_TH: Tensor,
    rows: HostRows,
    experts: Sequence[Expert],
    activation: Activation,
    *,
    z_RF: Tensor | None,
    y_XH: Tensor,
) -> None:
    hidden, inner = experts[0].w_out.shape
    gemm = _gemm(x_TH)
    most, room = _room(rows.tokens_R.shape[0], inner)
    x_CH, h_CI = x_TH.new_empty(room, hidden), x_TH.new_empty(room, inner)
    z_CF = x_TH.new_empty(most if z_RF is None else 0, activation.width(inner))  # only written and read by row
    for low, high, pieces in _tiles(rows.offsets, experts, most):
        torch.index_select(x_TH, 0, rows.tokens_R[low:high], out=x_CH[: high - low])
        z_nF = z_CF[: high - low] if z_RF is None else z_RF[low:high]
        for piece, at in pieces:
            slot.up(gemm, piece.expert, x_CH, at, out_mF=z_nF[at])
        activation.forward(z_nF, h_CI[: high - low])
        for piece, at in pieces:
            slot.down(gemm, piece.expert, h_CI, at, out_mH=y_XH[piece.start : piece.stop])


def backward(
    dy_TH: Tensor,
    x_TH: Tensor,
    z_RF: Tensor,
    rows: HostRows,
    *,
    experts: Sequence[Expert],
    activation: Activation,
    grads: Gradients,
    want_x: bool,
) -> Tensor | None:
    """Fill every buffer of `grads`, whatever it holds on arrival, and return dx (T, H), or None without `want_x`.

    With s the routing weight of a row and d = dy @ W_out: dS = <d, h> + <dy, b_out>, so no expert output is stored;
    dz = s * d * f'(z); dW_out = (s * dy).T @ h; dW_in = dz.T @ x; dx = the sum of dz @ W_in over a token's rows. A
    frozen slot skips its dW and nothing else. A z of no rows was not kept: each tile makes its own again, by the same
    products as the forward and so with the same bits. Importance: the identities of `fedmoe_kernels.experts.scores`.
    """
    for b, expert in enumerate(experts):
        if rows.offsets[b] == rows.offsets[b + 1]:
            slot.clear(expert, grads)
    if rows.real == 0:
        for buffer in (grads.weights, grads.scores):
            if buffer is not None:
                buffer.zero_()
        return torch.zeros_like(x_TH) if want_x else None
    sums = torch.float64 if x_TH.dtype == torch.float64 else torch.float32
    want_ds = grads.weights is not None or grads.scores is not None
    s_N1 = rows.weights_TK.flatten().index_select(0, rows.places_R[: rows.real]).to(sums).unsqueeze(1)
    out = _PerRow(
        s_N1,
        s_N1.new_zeros(rows.real + 1) if want_ds else None,
        _rows_and_zero(rows, x_TH) if want_x else None,
        s_N1.new_zeros(len(experts), dtype=torch.float64),
    )
    _backward_tiles((dy_TH, x_TH, z_RF), rows, experts, activation, grads=grads, out=out)
    if grads.weights is not None and out.ds_X is not None:
        grads.weights.copy_(out.ds_X[rows.rows_TK])  # row -1 is the last one, which is zero
    if grads.scores is not None and out.ds_X is not None:
        _score(grads, rows, (s_N1.squeeze(1) * out.ds_X[:-1]).double(), out.taylor_in_B)
    return None if out.dx_XH is None else _combine(out.dx_XH, rows, weighted=False)


class _PerRow(NamedTuple):
    """Routing weights by row, and what the tiles leave per row: dS and dx (None = not wanted); <z, dz> per slot."""

    s_N1: Tensor
    ds_X: Tensor | None
    dx_XH: Tensor | None
    taylor_in_B: Tensor


def _backward_tiles(
    tensors: tuple[Tensor, Tensor, Tensor],
    rows: HostRows,
    experts: Sequence[Expert],
    activation: Activation,
    *,
    grads: Gradients,
    out: _PerRow,
) -> None:
    dy_TH, x_TH, z_RF = tensors
    hidden, inner = experts[0].w_out.shape
    gemm = _gemm(x_TH)
    most, room = _room(rows.tokens_R.shape[0], inner)
    want_dz = out.dx_XH is not None or grads.want_in or grads.scores is not None
    row_CH, d_CI, h_CI, dz_CF = (x_TH.new_empty(room, n) for n in (hidden, inner, inner, z_RF.shape[1]))
    z_CF = x_TH.new_empty(0 if z_RF.shape[0] else most, z_RF.shape[1])
    for low, high, pieces in _tiles(rows.offsets, experts, most):
        n, s_n1, tokens_n = high - low, out.s_N1[low:high], rows.tokens_R[low:high]
        row_nH, d_nI, h_nI, dz_nF = row_CH[:n], d_CI[:n], h_CI[:n], dz_CF[:n]
        z_nF = z_RF[low:high] if z_RF.shape[0] else z_CF[:n]
        if not z_RF.shape[0]:
            torch.index_select(x_TH, 0, tokens_n, out=row_nH)
            for piece, at in pieces:
                slot.up(gemm, piece.expert, row_CH, at, out_mF=z_nF[at])
        learns = any(piece.expert.learns for piece, _ in pieces)
        torch.index_select(dy_TH, 0, tokens_n, out=row_nH)
        for piece, at in pieces:
            slot.down_back(gemm, piece.expert, row_CH, at, out_mI=d_nI[at])
        activation.prepare(z_nF, h_nI, dz_nF)
        if out.ds_X is not None:
            ds_n, product_nI = out.ds_X[low:high], dz_nF[:, :inner]
            torch.sum(torch.mul(d_nI, h_nI, out=product_nI), 1, dtype=ds_n.dtype, out=ds_n)
            for piece, at in pieces:
                if piece.expert.bias_out is not None:
                    ds_n[at] += row_nH[at] @ piece.expert.bias_out
        d_nI.mul_(s_n1)
        if want_dz:
            activation.backward(z_nF, d_nI, dz_nF)
        if learns and grads.want_out:
            row_nH.mul_(s_n1)
            for piece, at in pieces:
                slot.grad_out(gemm, piece.expert, grads, row_nH[at], h_nI[at], add=not piece.first)
        if out.dx_XH is not None:
            for piece, at in pieces:
                slot.up_back(gemm, piece.expert, dz_CF, at, out_mH=out.dx_XH[piece.start : piece.stop])
        if learns and grads.want_in:
            torch.index_select(x_TH, 0, tokens_n, out=row_nH)
            for piece, at in pieces:
                slot.grad_in(gemm, piece.expert, grads, dz_nF[at], row_nH[at], add=not piece.first)
        if grads.scores is not None:
            for piece, at in pieces:
                z_m, dz_m = (t[at].flatten().to(out.s_N1.dtype) for t in (z_nF, dz_nF))
                out.taylor_in_B[piece.slot] += torch.dot(z_m, dz_m)


def _score(grads: Gradients, rows: HostRows, sds_N: Tensor, taylor_in_B: Tensor) -> None:
    """Write (B, 6): rows, sum s*dS, sum |s*dS|, sum (s*dS)^2, sum <z, dz>, ||dW_in||^2 + ||dW_out||^2."""
    assert grads.scores is not None
    offsets_B1 = torch.tensor(rows.offsets, device=sds_N.device)
    terms_N3 = torch.stack([sds_N, sds_N.abs(), sds_N.square()], 1)
    sums_B3 = torch.segment_reduce(terms_N3, "sum", offsets=offsets_B1, axis=0, unsafe=True, initial=0)
    grad_sq_B = torch.zeros_like(taylor_in_B)
    for buffer in grads.matrices:
        if buffer is not None and buffer.shape[0]:
            grad_sq_B[: buffer.shape[0]] += _squares(buffer)
    columns = (offsets_B1.diff(), *sums_B3.unbind(1), taylor_in_B, grad_sq_B)
    grads.scores.copy_(torch.stack([c.to(sums_B3.dtype) for c in columns], 1))


def _squares(buffer_GNK: Tensor) -> Tensor:
    """||.||^2 of every slot's matrix, (G,) float64, with no copy of the matrices.

    A norm per row (float32 for halves), then one over the rows: within 3e-8 of float64, and the result is rounded to
    float32 (6e-8) as it is. ``vector_norm(dtype=float64)`` copies all of them in float64 first, twice the gradients:
    that made a step of 16 experts of 512 x 512 27 % larger, and 25 times slower here (38 ms, against 1.5 ms).
    """
    G, N, K = buffer_GNK.shape
    if not buffer_GNK.numel():
        return buffer_GNK.new_zeros(G, dtype=torch.float64)
    # Short rows are joined: an adapter's column of rank 1 would have as many norms as values.
    joined = math.gcd(N, max(1, _NORM_ROW // K))
    rows = N // joined
    squares = []
    for part_gnk in buffer_GNK.view(G, rows, K * joined).split(max(1, _NORM_ROWS // rows)):
        if buffer_GNK.dtype in (torch.float32, torch.float64):
            norm_gn = torch.linalg.vector_norm(part_gnk, dim=2)
        else:
            pieces = part_gnk.flatten(0, 1).split(max(1, _NORM_VALUES // (K * joined)))
            norm_gn = torch.cat([torch.linalg.vector_norm(piece.float(), dim=1) for piece in pieces]).view(-1, rows)
        squares.append(torch.linalg.vector_norm(norm_gn, dim=1).double().square())
    return torch.cat(squares)


def _gemm(like: Tensor) -> Gemm:
    return gemm_for(like.dtype) if like.device.type == "cpu" else Gemm(None)


def _room(rows: int, inner: int) -> tuple[int, int]:
    """C for R places, and the rows of its buffers: a product may read some rows past its own."""
    most = min(tile_rows(inner), rows)
    return most, most + most_slack(most)


def _tiles(offsets: list[int], experts: Sequence[Expert], most: int) -> Iterator[_Tile]:
    """Cut the rows into tiles of `most` rows, the last one shorter, wherever the slots' bounds fall.

    So the buffers' sizes follow from the shapes and not from the routing, at the price of one more piece per tile.
    """
    first = 0
    for low in range(0, offsets[-1], most):
        high = min(low + most, offsets[-1])
        pieces = []
        for b in range(first, len(experts)):
            start, stop = max(offsets[b], low), min(offsets[b + 1], high)
            if start < stop:
                piece = _Piece(experts[b], b, start, stop, start == offsets[b])
                pieces.append((piece, slice(start - low, stop - low)))
            if offsets[b + 1] >= high:
                first = b  # it may go on in the next tile
                break
        yield _Tile(low, high, pieces)


def _rows_and_zero(rows: HostRows, like_TH: Tensor) -> Tensor:
    """An empty buffer for all rows, and one row of zeros after them that places without a row point to."""
    buffer_XH = like_TH.new_empty(rows.real + 1, like_TH.shape[1])
    buffer_XH[-1].zero_()
    return buffer_XH


def _combine(rows_XH: Tensor, rows: HostRows, *, weighted: bool) -> Tensor:
    """Sum each token's rows, in the order of its choices: (T, H). Half precision is summed in float32.

    embedding_bag is a gather and a weighted sum in one pass: 10 to 25 times faster than gather, multiply, sum (on one
    thread, float32). One thread sums a bag, so its order is fixed.
    """
    T, K = rows.rows_TK.shape
    zero = rows_XH.shape[0] - 1
    if rows_XH.dtype in (torch.float32, torch.float64):
        index_R = rows.rows_TK.flatten().remainder(zero + 1)
        bags_T = torch.arange(0, T * K, K, device=rows_XH.device)
        weights_R = rows.weights_TK.flatten().to(rows_XH.dtype) if weighted else None
        return torch.embedding_bag(rows_XH, index_R, bags_T, False, 0, False, weights_R)[0]
    sum_TH = rows_XH.new_zeros(T, rows_XH.shape[1], dtype=torch.float32)
    for k in range(K):
        part_TH = rows_XH.index_select(0, rows.rows_TK[:, k].remainder(zero + 1)).float()
        sum_TH.addcmul_(part_TH, rows.weights_TK[:, k : k + 1].float()) if weighted else sum_TH.add_(part_TH)
    return sum_TH.to(rows_XH.dtype)
