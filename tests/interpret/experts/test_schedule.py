"""The schedule of the kernels over rows, against a loop over the slots; and the guard that makes lapses loud."""

from __future__ import annotations

import pytest
import torch

from fedmoe_kernels.gpu.experts.schedule import most_tiles, schedule

COUNTS = {
    "no row": [0, 0, 0],
    "one row": [0, 1, 0],
    "whole tiles": [16, 32, 16],
    "odd counts and empty slots": [0, 17, 0, 1, 16, 0, 47, 0],
    "one slot with all rows": [0, 0, 70, 0],
    "more slots than a block of the kernel": [i % 3 for i in range(300)],
    "more tiles than a block of the kernel": [16 * 150, 5],
}


@pytest.mark.parametrize("unused", [0, 5])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_schedule_covers_every_row_once(counts: list[int], unused: int) -> None:
    bounds = [0, *torch.tensor(counts).cumsum(0).tolist()]
    want, first = [], [0]
    for b in range(len(counts)):
        want += [[b, low, bounds[b + 1]] for low in range(bounds[b], bounds[b + 1], 16)]
        first.append(len(want))
    found = schedule(torch.tensor(bounds), bounds[-1] + unused, 16)
    assert found.tiles == most_tiles(bounds[-1] + unused, len(counts), 16) >= len(want)
    assert found.table_M4[: len(want), :3].tolist() == want
    assert (found.table_M4[len(want) :, 0] == -1).all()
    assert found.first_tile_B1.tolist() == first


def test_most_tiles_is_met() -> None:
    """The bound is not only safe but tight: one slot with a remainder of one row above every other's single row."""
    for slots, rows in ((1, 33), (4, 20), (5, 3), (7, 7), (3, 130)):
        spread = [1] * min(slots, rows)
        if rows > slots:
            spread[0] += rows - slots
        assert sum(-(-n // 16) for n in spread) == most_tiles(rows, slots, 16)


def test_memory_is_poisoned() -> None:
    like = torch.zeros(3)
    for made in (torch.empty(3), torch.empty_like(like), like.new_empty(3), torch.empty_strided((3,), (1,))):
        assert made.isnan().all()
    assert (torch.empty(3, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()
