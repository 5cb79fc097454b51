"""What a tile is, what a set of tiles is, and for which calls a set is meant."""

from __future__ import annotations

from dataclasses import dataclass, fields

# Bytes of shared memory that one program may use.
SHARED = {"sm_80": 163 * 1024, "sm_86": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}


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
        registers: the most that a thread may have, so that more programs fit an SM; 0 = as many as the compiler likes.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    group: int = 8
    split: int = 1
    tma: bool = False
    registers: int = 0

    def __post_init__(self) -> None:
        for name in ("m", "n", "k", "warps", "stages", "group", "split"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}; give a whole number from 1")
        for name in ("m", "n", "k"):
            value = getattr(self, name)
            if value < 16 or value & (value - 1):
                raise ValueError(f"{name} is {value}; blocks are powers of two from 16")
        if self.warps not in (1, 2, 4, 8, 16):
            raise ValueError(f"warps is {self.warps}; give 1, 2, 4, 8 or 16")
        if self.n % self.split or self.split & (self.split - 1):
            raise ValueError(f"split is {self.split}; give a power of two that divides n = {self.n}")
        if type(self.registers) is not int or self.registers not in (0, *range(64, 256, 8)):
            raise ValueError(f"registers is {self.registers!r}; give 0 or a multiple of 8 from 64 to 248")
        if type(self.tma) is not bool:
            raise ValueError(f"tma is {self.tma!r}; give true or false")


@dataclass(frozen=True)
class TileSet:
    """One tile per kernel family; all kernels over rows share `m`, so that one schedule serves them.

    Attributes:
        up, down, data_gradient, input_gradient, weight_gradient: the stages of the experts.
        rank: products with a rank-sized result (adapters); n is the most columns it computes at once.
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


FAMILIES = tuple(field.name for field in fields(TileSet))


@dataclass(frozen=True)
class Entry:
    """One line of a table: tiles, and for what they are meant.

    Attributes:
        bytes: of an element of the weights.
        below: serves fewer rows per slot than this; None = any number.
        hidden, inner: the layer's H and I; None = any.
    """

    arch: str
    bytes: int
    tiles: TileSet
    below: int | None = None
    hidden: int | None = None
    inner: int | None = None

    @property
    def exact(self) -> bool:
        """Whether it is for one shape only."""
        return self.hidden is not None and self.inner is not None

    def serves(self, bytes_: int, rows_per_slot: float, hidden: int | None, inner: int | None) -> bool:
        """Tell whether this line is meant for a call."""
        return (
            self.bytes == bytes_
            and (self.below is None or rows_per_slot < self.below)
            and self.hidden in (None, hidden)
            and self.inner in (None, inner)
        )


Table = tuple[Entry, ...]
