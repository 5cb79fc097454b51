"""What a tile is, what a set of tiles is, and for which calls a set is meant."""

from __future__ import annotations

from dataclasses import dataclass, fields

# Bytes of shared memory that one program may use.
SHARED = {"sm_80": 163 * 1024, "sm_86": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
# Architectures with products of warp groups, whose operands are read from shared memory.
WARP_GROUPS = ("sm_90", "sm_100")
PIECE = 32 * 1024  # bytes of a result that are on their way to memory at once, see `Tile.store_bytes`
BARRIERS = 256  # bytes that barriers and alignment take at most; 24 to 64 in what compiles today


def steps_held(arch: str, rows: int, stages: int) -> int:
    """Count the steps whose operands a loop of `stages` holds in shared memory at once.

    Products of warp groups, which blocks of at least 64 rows have where the architecture does, read theirs while the
    next ones arrive; all others hold one step less.
    """
    return stages if arch in WARP_GROUPS and rows >= 64 else max(1, stages - 1)


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
        persistent: whether a program takes one tile after the other, see `gpu/experts/persistent.py`; of `down` and
            `input_gradient` only, and only where both operands come by descriptor and rows are written as they lie.

    Of the weight gradient `stages` counts those that a row index takes too, which is loaded in the loop.
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
    persistent: bool = False

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
        for name in ("tma", "persistent"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} is {getattr(self, name)!r}; give true or false")

    @property
    def steps_held(self) -> int:
        """Steps whose operands the weight gradient holds: its pipeline spends a stage on each row index ahead."""
        return (self.stages - 1) // 2 + 1

    def store_bytes(self, itemsize: int) -> int:
        """Count the bytes that a result takes on its way to memory, beside the next operands, at most.

        The compiler takes a block through shared memory whole or in pieces of 32 KB, in all that has been compiled.
        Where no operands are waiting it takes the place of the last ones, and costs nothing.
        """
        return min(self.m * self.n * itemsize, PIECE) if self.persistent else 0


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

    def shared_bytes(self, family: str, arch: str, itemsize: int, *, gated: bool) -> int:
        """Return the most bytes of shared memory that one kernel's operands take, row indices and barriers included.

        Args:
            family: one of `FAMILIES`.
            arch: a key of `SHARED`.
            itemsize: bytes of an element of the weights.
            gated: whether the up-projection's blocks have two halves.
        """
        tile: Tile = getattr(self, family)
        summed = family == "weight_gradient"
        columns = 2 * tile.n if family == "up" and gated else tile.n
        held = steps_held(arch, tile.m, tile.steps_held if summed else tile.stages)
        index = 8 * tile.k * tile.stages if summed else 0
        return held * (tile.m + columns) * tile.k * itemsize + index + tile.store_bytes(itemsize) + BARRIERS

    def fitting(self, arch: str, itemsize: int, *, gated: bool) -> TileSet:
        """Return the set itself, if all of it fits the shared memory of `arch`.

        Raises:
            ValueError: names the kernel that does not fit, what it takes and what there is.
        """
        for family in FAMILIES:
            taken = self.shared_bytes(family, arch, itemsize, gated=gated)
            if taken > SHARED[arch]:
                raise ValueError(
                    f"{family} takes {taken} bytes of shared memory, and {arch} has {SHARED[arch]}; "
                    "give it smaller blocks or fewer stages"
                )
        return self


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
