"""Which tile a call gets: from the static tables, cut to its shape, or from a file; a wrong file is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmoe_kernels.tiles import lookup as configs
from fedmoe_kernels.tiles.lookup import SHARED, Tile, TileSet, arch_of, arch_of_capability, load, tiles_for
from fedmoe_kernels.tiles.static import TABLE
from fedmoe_kernels.tiles.tile import FAMILIES, Entry

BF16 = torch.bfloat16
Write = Callable[..., Path]


def line(**changes: Any) -> dict[str, Any]:
    """One line of a table file: the static tiles of sm_90 for many rows, with a depth that no static tile has."""
    tiles = tiles_for("sm_90", BF16, 2048)
    families = {name: asdict(replace(getattr(tiles, name), k=16)) for name in FAMILIES}
    return {"arch": "sm_90", "bytes": 2, **families, **changes}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def written(*lines: dict[str, Any], name: str = "tiles.json") -> Path:
        path = tmp_path / name
        path.write_text(json.dumps({"device": "made up", "tiles": lines}))
        return path

    return written


@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_number_of_rows_has_tiles(arch: str, dtype: torch.dtype) -> None:
    heights = [tiles_for(arch, dtype, rows).rows for rows in (0, 1, 16, 31, 32, 64, 95, 96, 128, 2048, 10**6)]
    assert heights == sorted(heights)
    assert heights[0] == 16
    assert heights[-1] == (64 if dtype == torch.float32 else 128)


def test_a_tile_depends_on_the_plan_alone() -> None:
    """Same arguments, same record: the table is looked up, nothing is measured or remembered."""
    assert tiles_for("sm_90", BF16, 64, hidden=2048, inner=768) == tiles_for("sm_90", BF16, 64, hidden=2048, inner=768)


def test_few_rows_get_low_blocks_and_only_newer_gpus_descriptors() -> None:
    assert [tiles_for("sm_90", BF16, rows).rows for rows in (8, 32, 64, 512)] == [16, 32, 64, 128]
    for entry in TABLE:
        assert not entry.arch.startswith("sm_8") or not any(getattr(entry.tiles, name).tma for name in FAMILIES)


def test_blocks_are_cut_to_the_shape() -> None:
    whole = tiles_for("sm_90", BF16, 2048)
    assert tiles_for("sm_90", BF16, 2048, hidden=2048, inner=768) == whole
    oss = tiles_for("sm_90", BF16, 2048, hidden=2880, inner=2880)
    assert (oss.down.n, oss.up.n) == (256, 128), "12 blocks of 256 compute 3072 columns, 6.7 % more than there are"
    assert 2880 % oss.down.k == 0
    narrow = tiles_for("sm_90", BF16, 2048, hidden=1408, inner=1408).down
    assert (narrow.n, narrow.persistent) == (128, True), "6 of 256 would compute 9 % more"
    small = tiles_for("sm_90", BF16, 2048, hidden=96, inner=48)
    assert not small.down.persistent, "an SM holds several programs"
    assert (small.up.n, small.down.n) == (32, 32)
    assert small.rows == whole.rows


@pytest.mark.parametrize(
    ("hidden", "inner", "without"),
    [
        (2048, 768, set()),
        (2044, 768, {"up", "input_gradient", "rank"}),
        (2048, 764, {"down", "data_gradient", "rank"}),
        (2044, 764, {"up", "down", "data_gradient", "input_gradient", "rank"}),
    ],
)
def test_descriptors_need_rows_of_whole_16_bytes(hidden: int, inner: int, without: set[str]) -> None:
    tiles = tiles_for("sm_90", BF16, 2048, hidden=hidden, inner=inner)
    assert {name for name in FAMILIES if not getattr(tiles, name).tma} == without | {"weight_gradient"}


def test_unknown_architectures_and_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match="no tiles for 'sm_70'"):
        tiles_for("sm_70", BF16, 64)
    with pytest.raises(ValueError, match=r"no tiles for torch\.float64"):
        tiles_for("sm_90", torch.float64, 64)


def test_capabilities_map_to_tables() -> None:
    known = {(8, 0): "sm_80", (8, 6): "sm_86", (8, 7): "sm_80", (8, 9): "sm_86", (9, 0): "sm_90", (10, 0): "sm_100"}
    known |= {(10, 3): "sm_100", (12, 0): "sm_86", (12, 1): "sm_86"}
    assert {capability: arch_of_capability(*capability) for capability in known} == known
    for capability in ((7, 5), (9, 1), (11, 0), (13, 0)):
        with pytest.raises(ValueError, match=f"capability {capability[0]}.{capability[1]}"):
            arch_of_capability(*capability)
    assert arch_of("cpu") == "interpret"
    with pytest.raises(ValueError, match="no kernels for device meta"):
        arch_of("meta")


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("entry", TABLE, ids=lambda entry: f"{entry.arch}-{entry.bytes}-{entry.below}")
def test_every_static_tile_fits_the_shared_memory(entry: Entry, gated: bool) -> None:
    assert entry.tiles.fitting(entry.arch, entry.bytes, gated=gated) is entry.tiles


def test_bytes_of_shared_memory_by_hand() -> None:
    """Of 128 x 256 blocks of bfloat16: on sm_90 all four stages are held, on sm_80 one less."""
    wide = tiles_for("sm_90", BF16, 2048)
    assert wide.down.persistent
    assert wide.shared_bytes("down", "sm_90", 2, gated=True) == 4 * (128 + 256) * 64 * 2 + 128 * 256 + 256
    wide = replace(wide, down=replace(wide.down, persistent=False))
    assert wide.shared_bytes("down", "sm_90", 2, gated=True) == 4 * (128 + 256) * 64 * 2 + 256
    assert wide.shared_bytes("up", "sm_90", 2, gated=True) == 4 * (128 + 256) * 64 * 2 + 256
    assert wide.shared_bytes("up", "sm_90", 2, gated=False) == 4 * (128 + 128) * 64 * 2 + 256
    held, index = 4 * (128 + 256) * 64 * 2, 7 * 64 * 8
    assert wide.shared_bytes("weight_gradient", "sm_90", 2, gated=True) == held + index + 256
    assert wide.shared_bytes("down", "sm_80", 2, gated=True) == 3 * (128 + 256) * 64 * 2 + 256


def test_tiles_that_no_shared_memory_holds_are_refused(monkeypatch: pytest.MonkeyPatch, write: Write) -> None:
    """As a whole, when the file is read; where only two halves of a gated form are too wide, when that is asked for."""
    wide = line()
    wide["down"] |= {"k": 64, "stages": 6}
    with pytest.raises(ValueError, match=r"tiles\[0\]: down takes 327936 bytes .* sm_90 has 232448; give it smaller"):
        load(write(wide, name="wide.json"), "a table")
    halves = line()
    halves["up"] |= {"k": 64, "n": 256, "stages": 3}
    monkeypatch.setenv("FEDMOE_TILES", str(write(halves, name="halves.json")))
    assert tiles_for("sm_90", BF16, 2048, gated=False).up.n == 256
    with pytest.raises(ValueError, match="up takes 246016 bytes"):
        tiles_for("sm_90", BF16, 2048)


def test_the_environment_overrides(monkeypatch: pytest.MonkeyPatch, write: Write) -> None:
    monkeypatch.setenv("FEDMOE_TILES", str(write(line())))
    assert tiles_for("sm_90", BF16, 2048).up.k == 16
    assert tiles_for("sm_80", BF16, 2048).up.k == 32, "a table without a line for an architecture leaves it alone"
    assert tiles_for("sm_90", torch.float32, 2048).up.k == 32
    assert tiles_for("interpret", BF16, 2048).rows == 16


def test_tiles_of_one_shape_are_taken_as_they_are(monkeypatch: pytest.MonkeyPatch, write: Write) -> None:
    """What was found best for 1408 columns is not cut, though 6 blocks of 256 compute 9 % more."""
    monkeypatch.setenv("FEDMOE_TILES", str(write(line(hidden=1408, inner=1408), name="exact.json")))
    assert tiles_for("sm_90", BF16, 2048, hidden=1408, inner=1408).down.n == 256
    assert tiles_for("sm_90", BF16, 2048, hidden=1408, inner=1024).down.n == 128


def test_the_file_is_read_once(monkeypatch: pytest.MonkeyPatch, write: Write) -> None:
    path = write(line(), name="once.json")
    monkeypatch.setenv("FEDMOE_TILES", str(path))
    first = tiles_for("sm_90", BF16, 2048)
    path.unlink()
    assert tiles_for("sm_90", BF16, 2048) == first


def test_the_narrowest_line_wins(write: Write) -> None:
    def marked(stages: int, **limits: int) -> dict[str, Any]:
        found = line(**limits)
        found["up"] = {**found["up"], "stages": stages}
        return found

    table = load(write(marked(1), marked(2, below=96), marked(3, below=32), marked(5, hidden=64, inner=32)), "a table")

    def stages(rows: float, hidden: int | None = None, inner: int | None = None) -> int:
        entry = configs.best(table, "sm_90", 2, rows, hidden=hidden, inner=inner)
        assert entry is not None
        return entry.tiles.up.stages

    assert [stages(rows) for rows in (8, 32, 95, 96)] == [3, 2, 2, 1]
    assert stages(8, 64, 32) == 5
    assert stages(8, 64, 48) == 3
    assert configs.best(table, "sm_80", 2, 8.0) is None


def test_a_gpu_s_own_table_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch, write: Write) -> None:
    path = write(line(), name="nvidia-h100-80gb-hbm3.json")
    monkeypatch.setattr(configs, "SHIPPED", path.parent)
    assert tiles_for("sm_90", BF16, 2048, device="NVIDIA H100 80GB HBM3").up.k == 16
    assert tiles_for("sm_90", BF16, 2048, device="NVIDIA H100 PCIe").up.k == 64
    configs._shipped.cache_clear()


def broken(**changes: Any) -> dict[str, Any]:
    return line(up={**line()["up"], **changes})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (broken(m=24), r"tiles\[0\].up: m is 24; blocks are powers of two from 16"),
        (broken(k=8), "k is 8"),
        (broken(n="128"), "n is '128'; give a whole number"),
        (broken(warps=3), "warps is 3"),
        (broken(stages=0), "stages is 0"),
        (broken(stages=True), "stages is True"),
        (broken(split=3), "split is 3"),
        (broken(registers=100), "registers is 100"),
        (broken(tma=1), "tma is 1; give true or false"),
        (broken(width=1), "give an object with"),
        (broken(m=64), "blocks of \\[64, 128\\] rows; they share one schedule"),
        (line(arch="sm_80"), "tensor descriptors on sm_80"),
        (line(arch="sm_70"), "is for 'sm_70'"),
        (line(bytes=8), "8 bytes"),
        (line(below=0), "below is 0"),
        (line(hidden="2048"), "hidden is '2048'"),
        (line(note=1), "'note' unknown or missing"),
        ({key: value for key, value in line().items() if key != "down"}, "'down' unknown or missing"),
    ],
)
def test_a_wrong_line_is_named(
    monkeypatch: pytest.MonkeyPatch, write: Write, wrong: dict[str, Any], message: str
) -> None:
    monkeypatch.setenv("FEDMOE_TILES", str(write(wrong, name=f"{abs(hash(message))}.json")))
    with pytest.raises(ValueError, match=message) as caught:
        tiles_for("sm_90", BF16, 2048)
    assert str(caught.value).startswith("FEDMOE_TILES=")


@pytest.mark.parametrize("content", ["", "[]", '{"tiles": 3}', '{"tiles": [3]}', "\ufeff{", "\x00"])
def test_a_file_that_is_no_table_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    monkeypatch.setenv("FEDMOE_TILES", str(path))
    with pytest.raises(ValueError, match=r"FEDMOE_TILES=.*bad\.json (cannot be read|is not a table)"):
        tiles_for("sm_90", BF16, 2048)
    monkeypatch.setenv("FEDMOE_TILES", str(tmp_path / "absent.json"))
    with pytest.raises(ValueError, match=r"absent\.json cannot be read"):
        tiles_for("sm_90", BF16, 2048)


def test_tiles_over_rows_share_their_height() -> None:
    tile = Tile(64, 64, 64, 4, 3)
    with pytest.raises(ValueError, match="share one schedule"):
        TileSet(tile, tile, tile, replace(tile, m=32), tile, tile)
