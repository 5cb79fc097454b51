"""The most bytes that a call on a GPU allocates at once, in closed form; importable where there is no Triton.

Shapes: T tokens, K top-k, R = T * K places, B slots, G slots with gradient buffers, M tiles, H hidden, I intermediate,
F = 2 * I when gated else I, r rank. All bytes are as asked for; torch's allocator rounds each block up to 512.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedmoe_kernels.tiles.tile import Tile, TileSet

# As in the kernels, which cannot be imported without Triton: rows of a program that adds up importance, and the width
# below which a weight gradient is computed as its transpose.
_PIECE, _NARROW = 32, 64
# From so many rows a slot on, a product's frozen slots in codes are decoded first. To decode the two stacks of a Qwen3
# layer (604 million weights) writes 1.2 GB and reads them again, 0.5 ms; codes read inside a product have narrower
# blocks and decode in every tile. By prediction for an H100 (bench/aot/formats.py), forward and backward together are
# as fast either way at about 620 rows, fp8_e4m3 at 600, and nf4, whose levels take 24 instructions a weight, at 180.
_DECODE_FROM = 640
_DECODE_LEVELS_FROM = 192
# Most bytes decoded at once: what w_in of the layer above takes in bfloat16. Each piece of a stack has a launch
# of its own, with a program for every tile of all slots: 13,000 for that layer, most with nothing to do, some 0.1 ms.
ROOM = 768 * 2**20


@dataclass(frozen=True)
class CallSizes:
    """The sizes of one call.

    Attributes:
        tokens, choices, hidden, inner, slots: T, K, H, I and B.
        gated: whether F = 2 * I.
        tiles: what `lookup.tiles_for` gives for this call.
        learning: G, slots with weight gradients, or with adapters where there is a `rank`.
        rank: r of adapters, 0 = none.
        itemsize: bytes of a value of x.
        decoded: frozen slots in codes that the call decodes before its products, where `decodes` says so.
    """

    tokens: int
    choices: int
    hidden: int
    inner: int
    slots: int
    gated: bool
    tiles: TileSet
    learning: int = 0
    rank: int = 0
    itemsize: int = 2
    decoded: int = 0

    @property
    def rows(self) -> int:
        """R."""
        return self.tokens * self.choices

    @property
    def width(self) -> int:
        """F."""
        return 2 * self.inner if self.gated else self.inner

    @property
    def most_tiles(self) -> int:
        """M."""
        if self.rows <= self.slots:
            return self.rows
        return -(-(self.rows - self.slots + 1) // self.tiles.rows) + self.slots - 1

    @property
    def pieces(self) -> int:
        """S, as `row_sums.tile_pieces`."""
        return self.most_tiles * (self.tiles.rows // min(self.tiles.rows, _PIECE))

    @property
    def schedule(self) -> int:
        """Bytes of the tile table."""
        return 16 * self.most_tiles + 4 * (self.slots + 1)

    def by_row(self, *widths: int) -> int:
        """Count the bytes of buffers with a row for every place."""
        return self.itemsize * self.rows * sum(widths)

    def room(self, values: int) -> int:
        """Count the bytes that codes are decoded to, of a stack of matrices with so many values each."""
        nbytes = values * self.itemsize
        return slots_at_once(self.decoded, nbytes) * nbytes if self.decoded else 0

    @property
    def room_in(self) -> int:
        """Bytes to decode w_in to."""
        return self.room(self.width * self.hidden)

    @property
    def room_out(self) -> int:
        """Bytes to decode w_out to."""
        return self.room(self.hidden * self.inner)


def decodes(form: str, rows_per_slot: int) -> bool:
    """Tell whether a call with so many rows a slot decodes frozen slots of a format before its products."""
    return rows_per_slot >= (_DECODE_LEVELS_FROM if form == "nf4" else _DECODE_FROM)


def slots_at_once(slots: int, nbytes: int) -> int:
    """Return how many slots' matrices, decoded of `nbytes` each, are decoded at once: what `ROOM` holds, evenly."""
    pieces = -(-slots // max(1, ROOM // nbytes))
    return -(-slots // pieces)


def forward_bytes(sizes: CallSizes, *, keep_z: bool = True, scores: bool = False) -> int:
    """Return the most a forward allocates at once; of these z (R * F values, with `keep_z`) and y (T * H) stay.

    With `scores` the norms of the outputs are summed, by piece of a tile and then by slot; 4 bytes a slot stay, too.
    """
    z = sizes.by_row(sizes.width) if keep_z else 0
    y = sizes.itemsize * sizes.tokens * sizes.hidden
    products = sizes.by_row(sizes.inner, sizes.rank)
    first = products + sizes.room_in
    kept = 4 * sizes.slots if scores else 0
    norms = kept + 4 * sizes.pieces if scores else 0
    if sizes.choices == 1:
        return sizes.schedule + z + max(first, products + y + sizes.room_out, y + norms)
    rows = sizes.by_row(sizes.hidden)
    return sizes.schedule + z + max(first, rows + products + sizes.room_out, rows + norms, rows + kept + y)


def backward_bytes(sizes: CallSizes, *, recompute: bool = False, scores: bool = True) -> int:
    """Return the most a backward allocates at once, all gradients but those of biases asked for.

    Of these dx (T * H values), dS, the weight gradients (G * (F + I) * H) or the factors' and the scores stay. Every
    row's token and place, 16 bytes, are made again. Frozen experts in codes take narrower blocks, and so up to twice
    the partial sums by row: 4 bytes a row and block.
    """
    columns = -(-sizes.inner // sizes.tiles.data_gradient.n)
    small = 16 * sizes.rows + sizes.schedule + (4 * sizes.learning * _blocks(sizes) if scores else 0)
    partial = 4 * columns * (sizes.rows + (sizes.most_tiles if scores else 0))
    ds = 4 * sizes.rows
    sums = 16 * sizes.pieces if scores else 0
    r, F, H, inner = sizes.rank, sizes.width, sizes.hidden, sizes.inner
    dx = sizes.itemsize * sizes.tokens * H
    by_slot = sizes.itemsize * sizes.learning
    last, first = (by_slot * r * (H + inner), by_slot * r * (F + H)) if r else (by_slot * H * inner, by_slot * F * H)
    sent = small + sizes.by_row(r, F, inner if sizes.learning else 0)  # with dyb, dz and s * h
    again = sizes.by_row(F) if recompute else 0
    peaks = [sent + partial + max(again + sizes.room_out, ds + sums)]
    peaks.append(small + sizes.by_row(r, r) + again + sizes.room_in if recompute else 0)
    kept = ds + sums
    peaks.append(sent + kept + last + sizes.by_row(r))  # s * ha
    kept += last
    rows = 0 if sizes.choices == 1 else sizes.by_row(H)
    peaks.append(small + kept + sizes.by_row(F, r) + rows + (0 if rows else dx) + sizes.room_in)
    peaks.append(small + kept + sizes.by_row(F, r) + rows + dx)
    peaks.append(small + kept + sizes.by_row(F, r, r) + dx + first + (24 * sizes.slots if scores else 0))
    return max(peaks)


def _blocks(sizes: CallSizes) -> int:
    """How many squared norms the weight gradients of one slot leave."""
    r, F, H, inner = sizes.rank, sizes.width, sizes.hidden, sizes.inner
    matrices = ((r, H), (F, r), (r, inner), (H, r)) if r else ((F, H), (H, inner))
    return sum(_output_blocks(P, Q, sizes.tiles.weight_gradient) for P, Q in matrices)


def _output_blocks(P: int, Q: int, tile: Tile) -> int:
    """As `weight_gradient.output_blocks`, which needs Triton."""
    down, across = (Q, P) if min(Q, _NARROW) > P else (P, Q)
    blocks = 1
    for size, most in ((down, tile.m), (across, tile.n)):
        blocks *= -(-size // min(most, max(16, 1 << (size - 1).bit_length())))
    return blocks
