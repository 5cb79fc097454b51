"""What the kernels over rows have in common: which tile a program works on, and how a block of an operand is loaded.

All row offsets are computed in 64 bits before they are multiplied by a width: T * K * 2I and E * 2I * H exceed 2^31 on
models that exist.
"""

import triton
import triton.language as tl


@triton.jit
def position(pid, num_tiles, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """(tile, column block) of a program: the columns of GROUP tiles run together, so that they meet in the L2 cache."""
    group = pid // (GROUP * COLUMNS)
    first = group * GROUP
    height = min(num_tiles - first, GROUP)
    within = pid % (GROUP * COLUMNS)
    return first + within % height, within // height


@triton.jit
def tile_rows(table, tile, M: tl.constexpr):
    """(slot, first row, rows (M,) int64, live (M,) bool) of a tile; slot -1 = nothing to do."""
    slot = tl.load(table + tile * 4)
    first = tl.load(table + tile * 4 + 1)
    stop = tl.load(table + tile * 4 + 2)
    rows = first + tl.arange(0, M)
    return slot, first, rows.to(tl.int64), rows < stop


@triton.jit
def row_block(a, rows, live, first, k0, WIDTH: tl.constexpr, K: tl.constexpr, TMA: tl.constexpr):
    """Columns k0..k0 + K - 1 of some rows of a matrix (X, WIDTH): (M, K), 0 outside.

    By address the matrix rows are `rows`, which may be any (a gather); by descriptor they are first..first + M - 1,
    and rows that are not live hold whatever lies there.
    """
    if TMA:
        return a.load([first, k0])
    else:
        k = k0 + tl.arange(0, K)
        places = a + rows[:, None] * WIDTH + k[None, :]
        if WIDTH % K == 0:
            return tl.load(places, mask=live[:, None], other=0.0)
        else:
            return tl.load(places, mask=live[:, None] & (k[None, :] < WIDTH), other=0.0)


@triton.jit
def weight_block(
    w, index, n0, k0, N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    TRANSPOSED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Block (BK, BN) at (k0, n0) of matrix `index` of a stack, ready to be a product's right operand; 0 outside.

    The stack is (X, N, K), or (X, K, N) when TRANSPOSED. By descriptor, bounds hold on every axis, so that no block
    reaches into the next matrix: what lies there belongs to another expert, perhaps of another client.
    """
    if TRANSPOSED:
        if TMA:
            return w.load([index, k0, n0]).reshape([BK, BN])
        else:
            k, n = k0 + tl.arange(0, BK), n0 + tl.arange(0, BN)
            places = w + index.to(tl.int64) * (K * N) + k[:, None] * N + n[None, :]
            return tl.load(places, mask=(k[:, None] < K) & (n[None, :] < N), other=0.0)
    else:
        if TMA:
            return w.load([index, n0, k0]).reshape([BN, BK]).T
        else:
            k, n = k0 + tl.arange(0, BK), n0 + tl.arange(0, BN)
            places = w + index.to(tl.int64) * (N * K) + k[:, None] + n[None, :] * K
            return tl.load(places, mask=(k[:, None] < K) & (n[None, :] < N), other=0.0)
