"""Which tile every kernel uses: static tables by architecture and rows per slot, nothing tuned while training.

A tile is chosen from the shapes of one client's plan, never from those that share a launch, so a client's bits do
not depend on its cohort. A tile comes from the first of these that has one: the file that FEDMOE_TILES names, the table
that ships for this very GPU (written by bench/tune/run.py), the static tables (`static.py`). What each static tile
compiles to is in bench/results/aot-*.md.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fedmoe_kernels.tiles.static import INTERPRET, TABLE
from fedmoe_kernels.tiles.tile import FAMILIES, SHARED, Entry, Table, Tile, TileSet

__all__ = ["SHARED", "Tile", "TileSet", "arch_of", "arch_of_capability", "best", "fitted", "load", "slug", "tiles_for"]

OVERRIDE = "FEDMOE_TILES"
SHIPPED = Path(__file__).parent  # in the wheel too: the tables lie beside this file


def best(table: Table, arch: str, bytes_: int, rows_per_slot: float, **shape: int | None) -> Entry | None:
    """Find the narrowest line of `table` that serves a call: first one for its very shape, then the lowest `below`."""
    hidden, inner = shape.get("hidden"), shape.get("inner")
    fitting = [e for e in table if e.arch == arch and e.serves(bytes_, rows_per_slot, hidden, inner)]
    return min(fitting, key=lambda e: ((e.hidden is None) + (e.inner is None), e.below or float("inf")), default=None)


def tiles_for(
    arch: str,
    dtype: torch.dtype,
    rows_per_slot: float,
    *,
    hidden: int | None = None,
    inner: int | None = None,
    gated: bool = True,
    device: str | None = None,
) -> TileSet:
    """Return the tiles of `arch` ("sm_80", "sm_86", "sm_90", "sm_100" or "interpret") for weights of `dtype`.

    Args:
        rows_per_slot: rows an expert is expected to get, from the plan: tokens * k / slots of one client.
        hidden, inner: H and I; given, blocks are cut to the shape and descriptors used only where rows are aligned,
            unless the tiles were tuned for this very shape.
        gated: whether the up-projection has two halves of I columns.
        device: the GPU's name as torch gives it, for a table that was tuned on it.

    Raises:
        ValueError: for an architecture or dtype without a table, for a file in FEDMOE_TILES that is not one, or for
            tiles in it that the shared memory cannot hold.
    """
    if arch == "interpret":
        return INTERPRET
    if arch not in SHARED:
        raise ValueError(f"no tiles for {arch!r}; the tables cover {', '.join(SHARED)}")
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"no tiles for {dtype}; the kernels serve bfloat16, float16 and float32")
    shape = {"hidden": hidden, "inner": inner}
    named = os.environ.get(OVERRIDE)
    tables = (_override(named) if named else (), _shipped(slug(device)) if device else (), TABLE)
    found = (best(table, arch, dtype.itemsize, rows_per_slot, **shape) for table in tables)
    entry = next(entry for entry in found if entry is not None)
    tiles = entry.tiles.fitting(arch, dtype.itemsize, gated=gated)
    if hidden is None or inner is None or entry.exact:
        return tiles
    return fitted(tiles, hidden, inner, gated=gated, itemsize=dtype.itemsize)


def arch_of(device: torch.device | str) -> str:
    """Name the table that serves a device: "interpret" for the CPU, where the kernels run in Triton's interpreter.

    Raises:
        ValueError: for a GPU that has no table.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return "interpret"
    if device.type != "cuda" or torch.version.hip is not None:
        raise ValueError(f"no kernels for device {device}; they are for NVIDIA GPUs of compute capability 8.0 to 12.x")
    return arch_of_capability(*torch.cuda.get_device_capability(device))


def arch_of_capability(major: int, minor: int) -> str:
    """Name the table of a compute capability; 8.6, 8.9 and 12.x share one: 99 KB of shared memory, products by warp."""
    if major == 8:
        return "sm_86" if minor in (6, 9) else "sm_80"
    if major == 12:
        return "sm_86"
    if (major, minor) == (9, 0) or major == 10:
        return "sm_90" if major == 9 else "sm_100"
    raise ValueError(f"no tiles for compute capability {major}.{minor}; the tables cover 8.x, 9.0, 10.x and 12.x")


def fitted(tiles: TileSet, hidden: int, inner: int, *, gated: bool, itemsize: int) -> TileSet:
    """Cut `tiles` to a layer's shape: no block much wider than the matrix, no step that leaves a rest without need."""
    wide = 2 * inner if gated else inner
    shapes = {  # columns of the result and depth of the product
        "up": (inner, hidden),
        "down": (hidden, inner),
        "data_gradient": (inner, hidden),
        "input_gradient": (hidden, wide),
    }
    rows = {"up": (hidden,), "down": (inner,), "data_gradient": (inner,), "input_gradient": (wide, hidden)}
    cut = {name: _cut(getattr(tiles, name), n, k) for name, (n, k) in shapes.items()}
    cut["rank"] = _cut(tiles.rank, tiles.rank.n, min(hidden, inner))
    # The weight gradients of both matrices share a tile: (F, H) and (H, I).
    m, n = min(wide, hidden), min(hidden, inner)
    cut["weight_gradient"] = replace(
        tiles.weight_gradient, m=_columns(tiles.weight_gradient.m, m), n=_columns(tiles.weight_gradient.n, n)
    )
    rows |= {"weight_gradient": (hidden, wide, inner), "rank": (hidden, inner)}
    for name, widths in rows.items():
        if any(width * itemsize % 16 for width in widths):  # a descriptor's rows begin at multiples of 16 bytes
            cut[name] = replace(cut[name], tma=False)
    return TileSet(**cut)


def _cut(tile: Tile, columns: int, depth: int) -> Tile:
    n = _columns(tile.n, columns)
    k = tile.k
    while k > 32 and ((depth % k and depth % (k // 2) == 0) or k >= 2 * depth):
        k //= 2
    # Narrower blocks leave room for a second program on a multiprocessor, which fills the gap between tiles as well.
    return replace(tile, n=n, k=k, split=max(1, tile.split * n // tile.n), persistent=tile.persistent and n >= 128)


def _columns(n: int, columns: int) -> int:
    """Choose the widest block up to `n` that computes at most 8 % more columns than there are; 32 at least.

    Half the width takes a third more operands from the L2 cache: 2880 columns go as 12 x 256, not as 23 x 128.
    """
    while n > 32 and -(-columns // n) * n > 1.08 * columns:
        n //= 2
    return n


def slug(device: str) -> str:
    """Make the file name of a GPU's own table: "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


@cache
def _override(path: str) -> Table:
    """The table that the environment names, read once."""
    return load(Path(path), f"{OVERRIDE}={path}")


@cache
def _shipped(name: str) -> Table:
    path = SHIPPED / f"{name}.json"
    return load(path, str(path)) if path.exists() else ()


def load(path: Path, named: str) -> Table:
    """Read and check a table of tiles.

    The file is an object whose "tiles" is a list of objects: arch, bytes, optional below, hidden and inner (see
    `Entry`), and one object per kernel family with the fields of `Tile`. Other keys of the file, and "ms", are notes.

    Raises:
        ValueError: names the file, the line of the table and what is wrong with it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{named} cannot be read ({error}); give the path of a JSON table of tiles") from None
    lines = content.get("tiles") if isinstance(content, dict) else None
    if not isinstance(lines, list) or not all(isinstance(line, dict) for line in lines):
        raise ValueError(f'{named} is not a table of tiles; write {{"tiles": [...]}}, as bench/tune/run.py does')
    return tuple(_entry(line, f"{named}: tiles[{i}]") for i, line in enumerate(lines))


def _entry(line: Mapping[str, Any], where: str) -> Entry:
    known = {"arch", "bytes", "below", "hidden", "inner", "ms", *FAMILIES}
    wrong = sorted(line.keys() - known) or sorted({"arch", "bytes", *FAMILIES} - line.keys())
    if wrong:
        raise ValueError(f"{where} has {wrong[0]!r} unknown or missing; its keys are {', '.join(sorted(known))}")
    if line["arch"] not in SHARED or line["bytes"] not in (2, 4):
        raise ValueError(
            f"{where} is for {line['arch']!r} and {line['bytes']!r} bytes; give one of {list(SHARED)}, 2 or 4"
        )
    limits = {name: line.get(name) for name in ("below", "hidden", "inner")}
    for name, value in limits.items():
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{where}.{name} is {value!r}; give a whole number from 1, or null")
    tiles = {name: _tile(line[name], f"{where}.{name}") for name in FAMILIES}
    if line["arch"] in ("sm_80", "sm_86") and any(tile.tma for tile in tiles.values()):
        raise ValueError(f"{where} asks for tensor descriptors on {line['arch']}; set tma to false")
    try:
        fitting = TileSet(**tiles).fitting(line["arch"], line["bytes"], gated=False)
        return Entry(line["arch"], line["bytes"], fitting, **limits)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _tile(values: Any, where: str) -> Tile:
    names = {field.name for field in fields(Tile)}
    if not isinstance(values, dict) or values.keys() - names or {"m", "n", "k", "warps", "stages"} - values.keys():
        raise ValueError(f"{where} is {values!r}; give an object with {', '.join(sorted(names))}")
    try:
        return Tile(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
