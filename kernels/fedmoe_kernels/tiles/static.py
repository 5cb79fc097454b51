"""The static tables of tiles: one set per architecture, element size and class of rows per slot.

Every set compiles without spills and within the architecture's shared memory (bench/aot/run.py, run with the tests);
registers, bytes and predicted times of each are in bench/results/aot-*.md. None has been timed on a GPU yet.

How they were chosen. Many rows: the widest blocks whose sums fit the registers, for a block's operands cross the L2
cache once per block: 128 x 256 (both halves of a gated projection count as one width) and as many stages as fit. The
data gradient's epilogue needs as many registers as its sums again, so it is computed in pieces, and narrower on
Hopper. The weight gradient reads its row index inside the loop, which takes the pipeliner two stages for each one in
flight. Few rows: the time goes into streaming weights, so narrow blocks in many programs, each with 32 KB on the way.
"""

from __future__ import annotations

from dataclasses import replace

from fedmoe_kernels.tiles.tile import Entry, Table, Tile, TileSet

_SMALL = Tile(16, 16, 16, 1, 1, group=2, split=1)
INTERPRET = TileSet(_SMALL, _SMALL, _SMALL, _SMALL, _SMALL, _SMALL)


def _few_rows(m: int, stages: int, *, tma: bool) -> TileSet:
    """Make blocks of `m` rows, 16 or 32: weights are streamed once through narrow blocks."""
    gated = Tile(m, 64, 64, 4, stages, group=4, tma=tma)
    plain = Tile(m, 128, 64, 4, stages, group=4, tma=tma)
    return _set(gated, plain, gated, Tile(64, 128, m, 4, 7), gated)


def _set(up: Tile, down: Tile, data_gradient: Tile, weight_gradient: Tile, rank: Tile) -> TileSet:
    """Make a set whose input gradient has the tile of `down`, for both are the same kind of product."""
    return TileSet(up, down, data_gradient, down, weight_gradient, rank)


_MANY_AMPERE = _set(
    up=Tile(128, 64, 32, 8, 5),
    down=Tile(128, 128, 64, 8, 4),
    data_gradient=Tile(128, 128, 64, 8, 4, split=16),
    weight_gradient=Tile(128, 256, 32, 8, 7),
    rank=Tile(128, 64, 64, 8, 3),
)
_AMPERE = (
    (24, _few_rows(16, 5, tma=False)),
    (48, _few_rows(32, 4, tma=False)),
    (
        96,
        _set(
            up=Tile(64, 64, 64, 4, 4),
            down=Tile(64, 128, 64, 4, 4),
            data_gradient=Tile(64, 128, 64, 4, 3, split=8),
            weight_gradient=Tile(128, 128, 32, 8, 7),
            rank=Tile(64, 64, 64, 4, 4),
        ),
    ),
    (None, _MANY_AMPERE),
)
# 99 KB of shared memory, and the same tensor cores as Ampere's.
_NARROW = (
    *_AMPERE[:3],
    (
        None,
        _set(
            up=_MANY_AMPERE.up,
            down=Tile(128, 128, 64, 8, 3),
            data_gradient=Tile(128, 128, 64, 8, 3, split=16),
            weight_gradient=Tile(128, 128, 32, 8, 7),
            rank=_MANY_AMPERE.rank,
        ),
    ),
)
_SIXTY_FOUR = _set(  # weight-bound still: two programs an SM, so that one loads while the other stores
    up=Tile(64, 64, 64, 4, 4, tma=True),
    down=Tile(64, 128, 64, 4, 4, tma=True),
    data_gradient=Tile(64, 128, 64, 4, 4, split=8, tma=True),
    weight_gradient=Tile(128, 128, 32, 4, 7),
    rank=Tile(64, 64, 64, 4, 4, tma=True),
)
_WIDE = _set(
    up=Tile(128, 128, 64, 8, 4, split=4, tma=True),
    down=Tile(128, 256, 64, 8, 4, tma=True, persistent=True),
    # Two programs an SM, which 128 registers allow; left alone, the compiler takes up to 142.
    data_gradient=Tile(128, 128, 64, 8, 3, split=8, tma=True, registers=128),
    weight_gradient=Tile(128, 256, 64, 8, 7),
    rank=Tile(128, 64, 64, 4, 4, tma=True),
)
_HOPPER = (
    (24, _few_rows(16, 5, tma=True)),
    (48, _few_rows(32, 4, tma=True)),
    (96, _SIXTY_FOUR),
    (None, _WIDE),
)
# Sums lie in tensor memory, so the data gradient's blocks can be twice as wide; the epilogue then needs smaller pieces.
_BLACKWELL = (
    *_HOPPER[:3],
    (None, replace(_WIDE, data_gradient=Tile(128, 256, 64, 8, 4, split=16, tma=True))),
)


def _float(plain: Tile, *, narrow: int, depth: int) -> TileSet:
    """Make a float32 set: gated blocks `narrow` wide, weight gradients by steps of `depth` rows."""
    gated = replace(plain, n=narrow)
    return _set(gated, plain, gated, Tile(64, 64, depth, 4, 3), plain)


# float32 runs on the ordinary cores unless torch allows TF32: small blocks, for every product is held in registers.
_FLOAT = (
    (24, _float(Tile(16, 64, 32, 4, 3), narrow=64, depth=16)),
    (None, _float(Tile(64, 64, 32, 4, 3), narrow=32, depth=32)),
)
_SETS = {"sm_80": _AMPERE, "sm_86": _NARROW, "sm_90": _HOPPER, "sm_100": _BLACKWELL}
TABLE: Table = tuple(
    Entry(arch, itemsize, tiles, below)
    for arch, halves in _SETS.items()
    for itemsize, sets in ((2, halves), (4, _FLOAT))
    for below, tiles in sets
)
