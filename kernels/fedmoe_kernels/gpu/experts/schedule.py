"""The schedule: which rows each tile of the kernels over rows works on, computed on the device from the slots' bounds.

Tiles never cross a slot. Their number depends on the routing, so the table has room for the most there can be (known
from the shapes, nothing waits for the device), and what is left over is marked -1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedmoe_kernels.gpu.launch import Execute, Launch, cdiv


class Schedule(NamedTuple):
    """Tiles of up to `height` rows, by slot and then by row.

    Attributes:
        table_M4: (M, 4) int32: slot, first row, end of the slot's rows, unused; slot -1 = no tile.
        first_tile_B1: (B + 1,) int32; slot b owns tiles first_tile_B1[b]..first_tile_B1[b + 1] - 1.
        height: rows of a tile.
    """

    table_M4: Tensor
    first_tile_B1: Tensor
    height: int

    @property
    def tiles(self) -> int:
        """M, the most tiles there can be."""
        return self.table_M4.shape[0]


def most_tiles(rows: int, slots: int, height: int) -> int:
    """Return the most tiles that `rows` rows in `slots` slots can need: all slots but one leave a tile with one row."""
    if rows <= slots:
        return rows
    return -(-(rows - slots + 1) // height) + slots - 1


@triton.jit(do_not_specialize=["slots", "tiles"])
def _schedule_kernel(
    offsets, table, first_tile, slots, tiles,
    HEIGHT: tl.constexpr, TILES: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Each program finds the slots of TILES tiles by counting, for each, the slots that end before it."""
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    slot = tl.zeros((TILES,), tl.int32)
    start = tl.zeros((TILES,), tl.int32)  # first tile of the slot that a tile belongs to
    before = 0
    for s0 in range(0, slots, SLOTS):
        b = s0 + tl.arange(0, SLOTS)
        low = tl.load(offsets + b, mask=b < slots, other=0)
        high = tl.load(offsets + b + 1, mask=b < slots, other=0)
        count = ((high - low + HEIGHT - 1) // HEIGHT).to(tl.int32)
        end = before + tl.cumsum(count, 0)
        if tl.program_id(0) == 0:
            tl.store(first_tile + b + 1, end, mask=b < slots)
        passed = (end[None, :] <= tile[:, None]) & (b[None, :] < slots)
        slot += tl.sum(passed.to(tl.int32), 1)
        start = tl.maximum(start, tl.max(tl.where(passed, end[None, :], 0), 1))
        before += tl.sum(count, 0)
    if tl.program_id(0) == 0:
        tl.store(first_tile, 0)
    real = (slot < slots) & (tile < tiles)
    low = tl.load(offsets + slot, mask=real, other=0).to(tl.int32)
    stop = tl.load(offsets + slot + 1, mask=real, other=0).to(tl.int32)
    written = tile < tiles
    tl.store(table + tile * 4, tl.where(real, slot, -1), mask=written)
    tl.store(table + tile * 4 + 1, low + (tile - start) * HEIGHT, mask=written)
    tl.store(table + tile * 4 + 2, stop, mask=written)


def schedule(offsets_B1: Tensor, rows: int, height: int, execute: Execute = Launch.run) -> Schedule:
    """Make the schedule of R = `rows` places sorted by slot; `offsets_B1` (B + 1,) int64 as in `Routing`."""
    slots = offsets_B1.shape[0] - 1
    tiles = most_tiles(rows, slots, height)
    table_M4 = torch.empty(tiles, 4, dtype=torch.int32, device=offsets_B1.device)
    first_tile_B1 = torch.empty(slots + 1, dtype=torch.int32, device=offsets_B1.device)
    args = {"offsets": offsets_B1, "table": table_M4, "first_tile": first_tile_B1, "slots": slots, "tiles": tiles}
    # One program at least, for it writes first_tile even when there is no row. Blocks of 128 x 128 spill on triton 3.6.
    grid = (max(1, cdiv(tiles, 64)),)
    execute(Launch(_schedule_kernel, grid, {**args, "HEIGHT": height, "TILES": 64, "SLOTS": 128}, 4, 1))
    return Schedule(table_M4, first_tile_B1, height)
