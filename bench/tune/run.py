"""Find the tiles that are fastest on this GPU and write them to the table that the kernels take from then on.

    python -m bench.tune.run [--shape qwen3-30b-a3b ...] [--rows 2048 ...] [--family up ...]
    python -m bench.tune.run --seconds 45 --rows 2048 --family data_gradient --family up
    python -m bench.tune.run --dry-run --arch sm_90   # no GPU: what would be tried, and what the compiler refuses

For every shape, number of rows per slot and kernel family the search walks from the static tile to its fastest
neighbour until none is faster. Neighbours are compiled ahead of time, and those that spill, do not fit or miss the
tensor cores are dropped; the rest are timed with a cold L2 cache, interleaved. No time counts before the result agrees
with the static tile's and a second run gives the same bits. The heights of the kernels over rows are compared as a
whole, for they share one schedule, where all families are searched. Writes kernels/fedmoe_kernels/tiles/GPU.json after
every family, so that a run that is cut short keeps what it has found.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from bench.aot.sass import compiled_by, job_of, misses
from bench.common.cases import EDGE, STANDARD, TINY, Shape
from bench.common.clock import Clock
from bench.common.machine import about
from bench.tune.stages import Layer, gated, layer_of, scaled, stage
from fedmoe_kernels.gpu.launch import Launch
from fedmoe_kernels.tiles import lookup
from fedmoe_kernels.tiles.lookup import SHARED, tiles_for
from fedmoe_kernels.tiles.tile import FAMILIES, Tile, TileSet

# Rows per slot that are tried, each with the limit below which its line serves; None = no limit.
CLASSES = {12: 24, 32: 48, 64: 96, 256: 512, 2048: None}
STEPS = {
    "m": (64, 128, 256),
    "n": (32, 64, 128, 256),
    "k": (16, 32, 64, 128),
    "warps": (4, 8),
    "stages": (2, 3, 4, 5, 6, 7),
    "split": (1, 2, 4, 8, 16),
    "group": (1, 4, 8, 16),
    "tma": (False, True),
    "registers": (0, 128, 168),
    "persistent": (False, True),
}
TOGETHER = (
    ("n", "warps"),
    ("n", "stages"),
    ("k", "stages"),
    ("n", "split"),
    ("stages", "registers"),
)  # one hides what the other gains
MOST = 64  # neighbours of a tile that are tried
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}


@dataclass(frozen=True)
class Timed:
    """A tile and the median of its times."""

    tile: Tile
    ms: float


def neighbors(base: Tile, arch: str, family: str) -> list[Tile]:
    """List `base` first, then what differs from it in one number or in two that go together."""
    steps = dict(STEPS)
    unused = {"split"} - ({"split"} if family in ("up", "data_gradient") else set())
    unused |= {"tma", "persistent"} if arch in ("sm_80", "sm_86") else set()
    unused |= set() if family in ("down", "input_gradient") else {"persistent"}
    unused |= {"tma"} if family == "weight_gradient" else {"m"}
    found = [base]
    for names in (*((name,) for name in steps), *TOGETHER):
        for values in itertools.product(*(steps[name] for name in names)):
            changed = dict(zip(names, values, strict=True))
            same = any(getattr(base, name) == value for name, value in changed.items())
            fits = changed.get("split", base.split) * 16 <= changed.get("n", base.n)
            if fits and not same and not unused & changed.keys():
                found.append(replace(base, **changed))
    return found


def heights(tiles: TileSet) -> Iterator[TileSet]:
    """List `tiles`, and the same with blocks half and twice as high."""
    for m in (tiles.rows, tiles.rows // 2, tiles.rows * 2):
        if 16 <= m <= 128:
            over_rows = {name: replace(getattr(tiles, name), m=m) for name in FAMILIES if name != "weight_gradient"}
            yield replace(tiles, **over_rows)


def fitting(
    layer: Layer, family: str, tiles: list[Tile], arch: str, pool: ProcessPoolExecutor, *, wordy: bool = False
) -> list[Tile]:
    """Keep the tiles whose code passes every gate of the ahead-of-time table; `wordy` says each tile's result."""
    jobs = []
    for tile in tiles:
        launches: list[Launch] = []
        stage(layer, family, tile, launches.append)
        jobs.append(job_of(launches[-1], arch))
    kept, refused = [], 0
    for tile, job, code in zip(tiles, jobs, compiled_by(pool, jobs), strict=True):
        wrong = misses(job, code)
        if not wrong:
            kept.append(tile)
        refused += bool(code.error)
        if wordy:
            size = f"{code.registers:4} registers {code.shared / 1024:4.0f} KB"
            say(f"  {family:16}{brief(tile):64}{size}  {wrong or 'ok'}")
    say(f"  {family:16}{len(kept)} of {len(tiles)} tiles pass, {refused} do not compile")
    return kept


def same(out: dict[str, Tensor], truth: dict[str, Tensor], tolerance: float) -> bool:
    """Tell whether every result is within the relative norm error that its dtype allows; NaN is never."""
    errors = [(out[name].double() - truth[name].double()).norm() / truth[name].double().norm() for name in truth]
    return all(bool(error <= tolerance) for error in errors)


def fastest(layer: Layer, family: str, tiles: list[Tile], repeats: int, until: float = float("inf")) -> list[Timed]:
    """Time the tiles in turn, each after its result and a rerun have been compared; the first is the yardstick.

    Returns all that were timed, the fastest first. At `until` (as time.monotonic) no other tile and no other round is
    begun.
    """
    truth = stage(layer, family, tiles[0])
    times: dict[Tile, list[float]] = {}
    for tile in tiles:
        if time.monotonic() > until and times:
            break
        out, again = stage(layer, family, tile), stage(layer, family, tile)
        if not same(out, truth, TOLERANCE[layer.x_TH.dtype]):
            say(f"  {family:16}{brief(tile):64}WRONG RESULT, left out")
        elif any(not torch.equal(out[name], again[name]) for name in out):
            say(f"  {family:16}{brief(tile):64}NOT THE SAME BITS TWICE, left out")
        else:
            times[tile] = []
    clock = Clock(layer.x_TH.device.type)
    for turn in range(repeats):
        if turn and time.monotonic() > until:
            break
        for tile, found in times.items():
            found.append(_milliseconds(layer, family, tile, clock))
    return sorted((Timed(tile, statistics.median(found)) for tile, found in times.items()), key=lambda timed: timed.ms)


def _milliseconds(layer: Layer, family: str, tile: Tile, clock: Clock) -> float:
    """Of the launches alone, after the outputs have been made and the cache emptied."""
    marks: list[tuple[Any, Any]] = []

    def timed(launch: Launch) -> None:
        clock.start()
        first = clock.mark()
        launch.run()
        marks.append((first, clock.mark()))

    stage(layer, family, tile, timed)
    return sum(clock.milliseconds(first, last) for first, last in marks)


def brief(tile: Tile) -> str:
    """Describe a tile in a few words."""
    text = f"{tile.m}x{tile.n}x{tile.k}, {tile.warps} warps, {tile.stages} stages, group {tile.group}"
    text += f", split {tile.split}" if tile.split > 1 else ""
    return (
        text
        + (f", {tile.registers} registers" if tile.registers else "")
        + (", tma" if tile.tma else "")
        + (", persistent" if tile.persistent else "")
    )


def say(line: str) -> None:
    """Print progress, not results."""
    print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Search:
    """What is searched: the architecture, the dtype, the families, and how.

    Attributes:
        most: neighbours of a tile that are tried.
        walks: how often the search moves on to the fastest neighbour.
        repeats: times taken of each tile.
        pool: where tiles are compiled; None = they are not.
        device: where tiles are timed; None = they are not.
        until: when to begin nothing new, as time.monotonic.
        wordy: whether to say what became of every tile.
    """

    arch: str
    dtype: torch.dtype
    families: tuple[str, ...]
    most: int
    walks: int
    repeats: int
    pool: ProcessPoolExecutor | None
    device: str | None
    until: float = float("inf")
    wordy: bool = False

    def lines(self, shape: Shape, rows: int) -> Iterator[dict[str, Any]]:
        """Yield the table's line of one shape and number of rows after every family that has been timed."""
        start = tiles_for(self.arch, self.dtype, rows, hidden=shape.H, inner=shape.I, gated=gated(shape))
        unreal = layer_of(scaled(shape, rows), self.dtype, "meta") if self.pool else None
        real = layer_of(scaled(shape, rows), self.dtype, self.device) if self.device else None
        say(f"{shape.name}, {rows} rows a slot")
        if real is None:  # nothing is timed: say what would be tried at every height
            for tiles in heights(start):
                self._all(tiles, self.families if tiles is start else self._over_rows, unreal, real)
            return
        best, found = start, dict[str, float]()
        for family in self.families:
            winner = self._walk(getattr(start, family), family, unreal, real)
            if winner is not None:
                best, found[family] = replace(best, **{family: winner.tile}), winner.ms
                yield self._line(shape, rows, best, found)
        over_rows = self._over_rows
        if len(over_rows) == len(FAMILIES) - 1 and set(over_rows) <= found.keys():
            for tiles in list(heights(start))[1:]:  # the first is the start
                other = self._all(tiles, over_rows, unreal, real)
                if other is not None and sum(other[1].values()) < sum(found[name] for name in over_rows):
                    best = replace(other[0], weight_gradient=best.weight_gradient)
                    found |= other[1]
                    yield self._line(shape, rows, best, found)

    @property
    def _over_rows(self) -> tuple[str, ...]:
        """The families that share one schedule, and so the height of their blocks."""
        return tuple(name for name in self.families if name != "weight_gradient")

    def _line(self, shape: Shape, rows: int, tiles: TileSet, found: dict[str, float]) -> dict[str, Any]:
        limits = {"below": CLASSES.get(rows), "hidden": shape.H, "inner": shape.I}
        families = {name: asdict(getattr(tiles, name)) for name in FAMILIES}
        return {"arch": self.arch, "bytes": self.dtype.itemsize, **limits, **families, "ms": sum(found.values())}

    def _all(
        self, tiles: TileSet, families: tuple[str, ...], unreal: Layer | None, real: Layer | None
    ) -> tuple[TileSet, dict[str, float]] | None:
        """The families' best tiles and times at one height; None when one has no tile."""
        found = {}
        for family in families:
            winner = self._walk(getattr(tiles, family), family, unreal, real)
            if winner is None:
                continue
            tiles = replace(tiles, **{family: winner.tile})
            found[family] = winner.ms
        return (tiles, found) if len(found) == len(families) else None

    def _walk(self, tile: Tile, family: str, unreal: Layer | None, real: Layer | None) -> Timed | None:
        """From tile to faster tile; None where nothing is timed."""
        best = None
        for _ in range(self.walks):
            if time.monotonic() > self.until:
                say(f"  {family:16}out of time")
                break
            tried = neighbors(tile, self.arch, family)[: self.most]
            if unreal is not None and self.pool is not None:
                tried = fitting(unreal, family, tried, self.arch, self.pool, wordy=self.wordy)
            if real is None or not tried:
                return None
            timed = fastest(real, family, tried, self.repeats, self.until)
            if not timed:
                return best
            before = next((each.ms for each in timed if each.tile == tile), None)
            was = "" if before is None else f" (it was {before:.4f})"
            best = timed[0]
            say(f"  {family:16}{brief(best.tile):64}{best.ms:.4f} ms{was}, the best of {len(timed)}")
            if best.tile == tile:
                break
            tile = best.tile
        return best


def keep(path: Path, machine: dict[str, Any], lines: Iterable[dict[str, Any]]) -> None:
    """Write the table, after the kernels' own reader has accepted it; lines of shapes not searched now stay."""
    merged = _by_call(path) | {_call(line): line for line in lines}
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps({"machine": machine, "tiles": list(merged.values())}, indent=1) + "\n")
    lookup.load(draft, str(draft))
    draft.replace(path)


def with_families(path: Path, line: dict[str, Any], families: Iterable[str]) -> dict[str, Any]:
    """Put these families of `line` into the line of the table at `path` for the same calls, if there is one."""
    same = _by_call(path).get(_call(line))
    return line if same is None else same | {name: line[name] for name in (*families, "ms")}


def _by_call(path: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Read the lines of the table at `path`, none where there is no file, by the calls that they serve."""
    old = json.loads(path.read_text())["tiles"] if path.exists() else []
    return {_call(line): line for line in old}


def _call(line: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(line[name] for name in ("arch", "bytes", "below", "hidden", "inner"))


def main() -> int:
    """Search, and keep what was found."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.tune.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = {shape.name: shape for shape in (*STANDARD, EDGE, *TINY)}
    parser.add_argument("--shape", choices=known, action="append", help="default: every standard shape")
    parser.add_argument("--rows", type=int, choices=CLASSES, action="append", help="rows per slot; default: all")
    parser.add_argument("--family", choices=FAMILIES, action="append", help="default: all")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--most", type=int, default=MOST, help="neighbours of a tile that are tried")
    parser.add_argument("--walks", type=int, default=3, help="moves to a faster neighbour")
    parser.add_argument("--repeats", type=int, default=15, help="times taken of each tile; the median counts")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which nothing new is begun")
    parser.add_argument("--arch", choices=SHARED, help="default: that of this machine's GPU")
    parser.add_argument("--dry-run", action="store_true", help="compile and filter only; needs no GPU")
    parser.add_argument("--rehearse", action="store_true", help="time in Triton's interpreter; proves only the script")
    parser.add_argument("--out", type=Path, help="default: kernels/fedmoe_kernels/tiles/GPU.json")
    chosen = parser.parse_args()
    if chosen.rehearse and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("--rehearse needs TRITON_INTERPRET=1 in the environment")
    if not (chosen.dry_run or chosen.rehearse or torch.cuda.is_available()):
        parser.error("there is no GPU to time on; use --dry-run")
    if (chosen.dry_run or chosen.rehearse) and chosen.arch is None:
        parser.error("name the architecture with --arch, for there is no GPU to ask")
    device = None if chosen.dry_run else "cpu" if chosen.rehearse else "cuda"
    machine = about(device or "cpu", tiny=False)
    name = lookup.slug(machine["gpu"] or "none")
    out = chosen.out or lookup.SHIPPED / f"{name}.json"
    kinds = {"arch": chosen.arch or lookup.arch_of("cuda"), "dtype": getattr(torch, chosen.dtype), "device": device}
    how = {"most": chosen.most, "repeats": chosen.repeats, "until": time.monotonic() + chosen.seconds}
    with compilers(device) as pool:
        search = Search(
            families=tuple(chosen.family or FAMILIES),
            walks=1 if chosen.dry_run else chosen.walks,
            pool=None if chosen.rehearse else pool,
            wordy=chosen.dry_run,
            **kinds,
            **how,
        )
        shapes = [known[name] for name in chosen.shape or [shape.name for shape in STANDARD]]
        for shape, rows in itertools.product(shapes, chosen.rows or CLASSES):
            for line in search.lines(shape, rows):
                keep(out, machine | {"triton": triton.__version__}, [line])
                print(f"{shape.name}, {rows} rows a slot: {line['ms']:.4f} ms; written to {out}", flush=True)
    return 0


@contextmanager
def compilers(device: str | None) -> Iterator[ProcessPoolExecutor]:
    """Yield processes that compile into TRITON_CACHE_DIR, or where there is none into a folder for this run only."""
    with ExitStack() as stack:
        if "TRITON_CACHE_DIR" not in os.environ:
            os.environ["TRITON_CACHE_DIR"] = stack.enter_context(tempfile.TemporaryDirectory())
            stack.callback(os.environ.pop, "TRITON_CACHE_DIR")
        # Workers only compile, and must not inherit a CUDA context.
        context = multiprocessing.get_context("spawn" if device == "cuda" else "fork")
        yield stack.enter_context(ProcessPoolExecutor(os.cpu_count(), mp_context=context))


if __name__ == "__main__":
    sys.exit(main())
