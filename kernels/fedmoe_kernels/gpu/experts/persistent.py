"""The products of `down` by as many programs as the chip holds, each of which takes one tile after the other.

Shapes: R rows, M tiles, B slots, N and K the columns and the depth of the product.

A program that ends with its tile leaves the tensor cores idle until the next one's first operands have arrived. Here
the loop over tiles and the loop over steps are one to the compiler (`flatten`), so that the next tile's operands are on
their way while the last tile is stored. Each tile's sum is the same as in `down`, whichever program takes it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
import triton
import triton.language as tl

from fedmoe_kernels.gpu.blocks import bias_block, matrix, position, row_block, store_block, tile_rows, weight_block
from fedmoe_kernels.gpu.experts.schedule import Schedule
from fedmoe_kernels.gpu.launch import Launch

# Parameters that this kernel shares with that of `down`.
_SHARED = (
    *("a", "w", "w_frozen", "bias", "bias_frozen", "bases", "out", "table", "begin", "stop"),
    *("N", "K", "TRANSPOSED", "PART", "BM", "BN", "BK", "GROUP", "PRECISION"),
)
_WITHOUT_GPU = 3  # programs, so that in the interpreter each takes several tiles


@triton.jit(do_not_specialize=["slots", "begin", "stop", "programs"])
def _persistent_kernel(
    a, w, w_frozen, bias, bias_frozen, bases, out, table, first_tile, slots, begin, stop, programs,
    N: tl.constexpr, K: tl.constexpr, TRANSPOSED: tl.constexpr, PART: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Every `programs`-th block of BM rows by BN columns of a @ w^T + bias; a and w, (X, N, K) or (X, K, N), described.

    The number of programs decides no bit: each block's sum is the one of `down`.
    """
    COLUMNS: tl.constexpr = (N + BN - 1) // BN
    # The tiles that there are, not all that there could be: a tile to be skipped would keep the loops apart.
    tiles = tl.load(first_tile + slots)
    for block in tl.range(tl.program_id(0), tiles * COLUMNS, programs, flatten=True):
        tile, column = position(block, tiles, COLUMNS, GROUP)
        slot, first, rows, live = tile_rows(table, tile, BM)
        index, source, source_bias = matrix(slot, bases, begin, stop, w, w_frozen, bias, bias_frozen, PART)
        n0 = column * BN
        acc = tl.zeros((BM, BN), tl.float32)
        for step in range((K + BK - 1) // BK):
            left = row_block(a, rows, live, first, step * BK, K, BK, True)
            right = weight_block(source, index, n0, step * BK, N, K, BN, BK, TRANSPOSED, True)
            acc = tl.dot(left, right, acc, input_precision=PRECISION)
        if bias is not None:
            acc += bias_block(source_bias, index, n0, N, BN, N % BN == 0)
        start = first.to(tl.int64) * N
        store_block(out + start, tl.arange(0, BM), live, n0, acc, N, N, BN, N % BN == 0)


def persistent(launch: Launch, schedule: Schedule) -> Launch:
    """Make the launch from that of `down`: for all slots at once, both operands by descriptor."""
    args = launch.args
    programs = min(_processors(args["out"].device), launch.grid[0])
    more = {"first_tile": schedule.first_tile_B1, "slots": schedule.first_tile_B1.shape[0] - 1, "programs": programs}
    own = {name: args[name] for name in _SHARED}
    return replace(launch, kernel=_persistent_kernel, grid=(programs,), args=own | more)


@cache
def _processors(device: torch.device) -> int:
    """How many programs of these tiles a device holds: their operands fill the shared memory of a multiprocessor."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else _WITHOUT_GPU
