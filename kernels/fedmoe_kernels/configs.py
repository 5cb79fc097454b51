"""Which tile every kernel uses: static tables by architecture and rows per slot, nothing tuned while training.

A tile is chosen from the shapes of one client's plan and never from who shares a launch, so that a client's bits do
not depend on its cohort.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """Sizes of one kernel's blocks and how many warps and pipeline stages it runs with.

    Attributes:
        m: rows of a block (weight gradient: rows of the output matrix).
        n: columns of a block; in the gated up-projection columns of each half.
        k: depth of one step of the product (weight gradient: rows summed per step).
        warps, stages: as Triton's num_warps and num_stages.
        group: row blocks that run together for the sake of the L2 cache.
        split: pieces in which the epilogue is computed; more pieces, fewer registers.
        tma: whether operands that lie in order come by tensor descriptor (sm_90 and later).
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    group: int = 8
    split: int = 1
    tma: bool = False


@dataclass(frozen=True)
class TileSet:
    """One tile per kernel family; all kernels over rows share `m`, so that one schedule serves them.

    Attributes:
        up, down, data_gradient, input_gradient, weight_gradient: the stages of the experts.
        rank: products with a rank-sized result (adapters).
    """

    up: Tile
    down: Tile
    data_gradient: Tile
    input_gradient: Tile
    weight_gradient: Tile
    rank: Tile

    def __post_init__(self) -> None:
        heights = {self.up.m, self.down.m, self.data_gradient.m, self.input_gradient.m, self.rank.m}
        if len(heights) != 1:
            raise ValueError(f"the kernels over rows have blocks of {sorted(heights)} rows; they share one schedule")

    @property
    def rows(self) -> int:
        """Rows of a block in every kernel over rows."""
        return self.up.m


_SMALL = Tile(16, 16, 16, 1, 1, group=2, split=1)
_INTERPRET = TileSet(_SMALL, _SMALL, _SMALL, _SMALL, _SMALL, _SMALL)


def tiles_for(arch: str, dtype: torch.dtype, rows_per_slot: int) -> TileSet:
    """The tiles of `arch` ("sm_80", "sm_90", "sm_100" or "interpret") for weights of `dtype`.

    Args:
        rows_per_slot: rows an expert is expected to get, from the plan: tokens * k / slots of one client.

    Raises:
        ValueError: for an architecture without a table.
    """
    if arch == "interpret":
        return _INTERPRET
    raise ValueError(f"no tiles for {arch!r}; the tables cover sm_80, sm_90 and sm_100")
