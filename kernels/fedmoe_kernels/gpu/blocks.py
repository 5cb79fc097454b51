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
def load_within(
    places, k, n, K: tl.constexpr, N: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """What lies at `places`, 0 where k >= K or n >= N; sizes that divide need no mask."""
    if K % BK == 0 and N % BN == 0:
        return tl.load(places)
    elif K % BK == 0:
        return tl.load(places, mask=n < N, other=0.0)
    elif N % BN == 0:
        return tl.load(places, mask=k < K, other=0.0)
    else:
        return tl.load(places, mask=(k < K) & (n < N), other=0.0)


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
            return load_within(places, k[:, None], n[None, :], K, N, BK, BN)
    else:
        if TMA:
            return w.load([index, n0, k0]).reshape([BN, BK]).T
        else:
            k, n = k0 + tl.arange(0, BK), n0 + tl.arange(0, BN)
            places = w + index.to(tl.int64) * (N * K) + k[:, None] + n[None, :] * K
            return load_within(places, k[:, None], n[None, :], K, N, BK, BN)


@triton.jit
def matrix(slot, bases, begin, stop, w, w_frozen, bias, bias_frozen, PART: tl.constexpr):
    """(index, w, bias): where the matrix and the bias of a slot lie, as one stack each, and their index in it.

    PART says which slots the stacks hold, see `storage.Part`; the index is negative for a slot of another launch.
    Chosen before the loop: two loops would double shared memory.
    """
    index = slot
    if bases is not None:
        index = tl.load(bases + slot).to(tl.int32)
    # Without a bias w stands in for it, unread: Triton 3.6 cannot return a None.
    source, source_bias = w, w if bias is None else bias
    if PART == "both" and index >= begin:
        index -= begin
        source, source_bias = w_frozen, w_frozen if bias is None else bias_frozen
    if PART == "some":
        index = tl.where(index < stop, index - begin, -1)
    return index, source, source_bias


@triton.jit
def bias_block(bias, index, n0, N: tl.constexpr, BN: tl.constexpr, WHOLE: tl.constexpr):
    """Columns n0..n0 + BN - 1 of row `index` of a stack (X, N) as (1, BN) float32, 0 outside; WHOLE = none is."""
    n = n0 + tl.arange(0, BN)
    if WHOLE:
        block = tl.load(bias + index.to(tl.int64) * N + n)
    else:
        block = tl.load(bias + index.to(tl.int64) * N + n, mask=n < N, other=0.0)
    return block.to(tl.float32)[None, :]


@triton.jit
def pieces(block, M: tl.constexpr, N: tl.constexpr, COUNT: tl.constexpr):
    """The block (M, N) as COUNT blocks of N / COUNT columns, in order; no value changes its thread."""
    if COUNT == 1:
        return (block,)
    else:
        left, right = block.reshape(M, 2, N // 2).permute(0, 2, 1).split()
        return pieces(left, M, N // 2, COUNT // 2) + pieces(right, M, N // 2, COUNT // 2)


@triton.jit
def store_block(
    out, rows, live, n0, value, WIDTH: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    """Write (M, BN) to columns n0.. of the live rows of a matrix (X, WIDTH), of whose columns the first N count.

    WHOLE = no column lies outside.
    """
    n = n0 + tl.arange(0, BN)
    places = out + rows[:, None] * WIDTH + n[None, :]
    if WHOLE:
        tl.store(places, value.to(out.dtype.element_ty), mask=live[:, None])
    else:
        tl.store(places, value.to(out.dtype.element_ty), mask=live[:, None] & (n[None, :] < N))
