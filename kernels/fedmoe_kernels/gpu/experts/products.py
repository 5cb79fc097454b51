"""What products of rows with their slots' matrices share: the sums of a block, and a launch for each part of the slots.

Inside a kernel N and K are the columns and the depth of the product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fedmoe_kernels.gpu.blocks import row_block, weight_block
from fedmoe_kernels.gpu.experts.decode import decoded_block, scale_block, within
from fedmoe_kernels.gpu.experts.storage import Part
from fedmoe_kernels.gpu.launch import Launch, cdiv, row_constants
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


class Product(NamedTuple):
    """A product as its launches see it: (rows, depth) of `dtype` times a (columns, depth) of each of a slot's halves.

    `moved` are the bytes of rows, read and written; `transposed` says that the matrices are (depth, columns).
    """

    parts: Sequence[Part]
    rows: int
    columns: int
    depth: int
    dtype: torch.dtype
    moved: int
    transposed: bool = False
    halves: int = 1

    def launches(
        self, kernel: Any, tiles: int, tile: Tile, common: dict[str, Any], own: Callable[[Part, Tile], dict[str, Any]]
    ) -> list[Launch]:
        """Make the launches, each after what has to run before it: a program for each tile and block of columns.

        Args:
            kernel: what is launched.
            tiles: of rows.
            tile: sizes of the blocks, which each part cuts for itself.
            common: arguments of all launches.
            own: those that a part with its tile has besides.
        """
        found: list[Launch] = []
        slots = sum(part.slots for part in self.parts)
        for part in self.parts if tiles else ():
            cut = decoding_tile(tile, part, transposed=self.transposed)
            tma = cut.tma and part.describable
            block = (cut.k, cut.n) if self.transposed else (cut.n, cut.k)
            args = {
                **common,
                **part.arguments(block if tma else None, self.halves),
                **row_constants(cut, self.dtype, tma=tma),
                "steps": cdiv(self.depth, cut.k),
                **own(part, cut),
            }
            grid, share = (tiles * cdiv(self.columns, cut.n),), part.slots / slots
            flops = round(2 * self.rows * self.halves * self.columns * self.depth * share)
            cost = (flops, round(self.moved * share) + part.nbytes)
            found += (*part.before, Launch(kernel, grid, args, cut.warps, cut.stages, *cost, cut.registers))
        return found


def decoding_tile(tile: Tile, part: Part, *, transposed: bool = False) -> Tile:
    """Return the tile of a launch that reads `part`; for codes a large block is halved: decoding takes registers.

    Along the axis of the codes, n if `transposed` and k otherwise, a block meets whole groups or lies within one.
    """
    if part.codes is None:
        return tile
    n, k, share = tile.n // 2 if tile.m >= 64 else tile.n, tile.k, part.codes.share(part.w)
    if transposed:
        n = within(n, share)
        return replace(tile, n=n, k=min(k, 64), split=max(1, min(tile.split, n // 16)))
    return replace(tile, n=n, k=within(k, share), split=max(1, tile.split // 2))
