"""The carried cache: what is packed here is found there, nothing else is, and a cache of another triton is refused."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "bench"
PIECE = "correct/route: softmax, not"


def call(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the script with a cache of its own below `folder`."""
    names = ("TRITON_INTERPRET", "FEDMOE_TILES")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    command = [sys.executable, "-m", "bench.gpu.cache", *words, "--archive", str(folder / "box" / "triton.txz")]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def carried(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the packed kernels of one routing check."""
    from bench.stand_in import driver as stand_in

    if stand_in.missing() is not None or "TRITON_INTERPRET" in os.environ:
        pytest.skip(stand_in.missing() or "where Triton interprets, it cannot compile")
    folder = tmp_path_factory.mktemp("carried")
    done = call(folder, "build", "--part", "correct", "--only", PIECE, "--jobs", "1")
    assert done.returncode == 0, f"{done.stdout}{done.stderr[-3000:]}"
    return folder


def test_every_launch_is_found_in_what_is_carried(carried: Path) -> None:
    done = call(carried, "check", "--part", "correct", "--only", PIECE, "--jobs", "1")
    assert done.returncode == 0, f"{done.stdout}{done.stderr[-3000:]}"
    assert "5 kernels found, 0 not found" in done.stdout
    assert (carried / "box" / "commit").read_text().strip()


@pytest.mark.parametrize(
    "piece", ["routing/qwen3-30b-a3b, 1024 tokens", "model/1024", "time/qwen3-30b-a3b/quarter-128"]
)
def test_what_the_later_parts_launch_can_be_launched(carried: Path, piece: str) -> None:
    """Routing alone, a layer of the model and few tokens: none of them is carried here, so all of it is compiled."""
    part = piece.split("/")[0]
    done = call(carried, "check", "--part", part, "--only", piece, "--jobs", "1")
    assert "could not be launched" not in done.stdout, done.stdout
    assert "not found: _" in done.stdout


def test_what_is_not_carried_is_named(carried: Path) -> None:
    done = call(carried, "check", "--part", "correct", "--only", "correct/route: a cohort", "--jobs", "1")
    assert done.returncode == 1
    assert "not found: _" in done.stdout


def test_launchers_are_packed_under_both_of_their_names(carried: Path) -> None:
    with tarfile.open(carried / "box" / "triton.txz") as tar:
        modules = [Path(name) for name in tar.getnames() if name.endswith(".so")]
        assert not [name for name in tar.getnames() if name.endswith((".ptx", ".llir"))]
    import triton

    # Triton 3.6 has a module for each signature beside the driver's own; 3.7 has one for all.
    assert len({path.name for path in modules}) >= (2 if triton.__version__ < "3.7" else 1)
    assert len(modules) % 2 == 0
    assert len({path.parent for path in modules}) == len(modules)


def changed(carried: Path, folder: Path, **facts: str) -> Path:
    """The archive with other facts in it."""
    (folder / "box").mkdir()
    with (
        tarfile.open(carried / "box" / "triton.txz") as old,
        tarfile.open(folder / "box" / "triton.txz", "w:xz") as new,
    ):
        for member in old:
            data = old.extractfile(member)
            assert data is not None
            raw = data.read()
            if member.name == "about.json":
                raw = json.dumps(json.loads(raw) | facts).encode()
                member.size = len(raw)
            new.addfile(member, io.BytesIO(raw))
    return folder / "box" / "triton.txz"


def test_a_cache_of_another_triton_is_refused_in_one_sentence(carried: Path, tmp_path: Path) -> None:
    changed(carried, tmp_path, triton="3.5.0")
    done = call(tmp_path, "unpack")
    assert done.returncode == 3
    (line,) = done.stdout.splitlines()
    assert line.startswith("the carried cache is of another triton (3.5.0; here ")
    assert not (tmp_path / "cache").exists()


def test_a_cache_of_other_kernels_is_unpacked_and_says_so_in_one_sentence(carried: Path, tmp_path: Path) -> None:
    """What did not change is found; the rest is compiled beside the first parts, as if there were no cache."""
    changed(carried, tmp_path, kernels="0123", commit="abc")
    done = call(tmp_path, "unpack")
    assert done.returncode == 3
    (line,) = done.stdout.splitlines()
    assert line == "the carried cache is of other sources, of abc; kernels that changed are compiled here"
    assert list((tmp_path / "cache").glob("*/*.cubin"))


@pytest.mark.parametrize(("name", "kind"), [("../outside.txt", tarfile.REGTYPE), ("a_link", tarfile.SYMTYPE)])
def test_a_cache_writes_files_below_its_folder_alone(carried: Path, tmp_path: Path, name: str, kind: bytes) -> None:
    archive = changed(carried, tmp_path)
    with tarfile.open(carried / "box" / "triton.txz") as old, tarfile.open(archive, "w:xz") as new:
        about = old.extractfile("about.json")
        assert about is not None
        raw = about.read()
        first, bad = tarfile.TarInfo("about.json"), tarfile.TarInfo(name)
        first.size, bad.type, bad.linkname = len(raw), kind, "/etc/passwd"
        new.addfile(first, io.BytesIO(raw))
        new.addfile(bad, io.BytesIO(b""))
    done = call(tmp_path, "unpack")
    assert done.returncode == 3, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"the carried cache cannot be read (it holds {name}, which is not a file below its folder)")
    assert not (tmp_path / "outside.txt").exists()
    assert not (tmp_path / "cache" / "a_link").is_symlink()


@pytest.mark.parametrize("harm", ["missing", "cut", "rubbish"])
def test_a_cache_that_cannot_be_read_is_refused_in_one_sentence(carried: Path, tmp_path: Path, harm: str) -> None:
    (tmp_path / "box").mkdir()
    whole = (carried / "box" / "triton.txz").read_bytes()
    if harm != "missing":
        (tmp_path / "box" / "triton.txz").write_bytes(whole[:300] if harm == "cut" else b"rubbish")
    done = call(tmp_path, "unpack")
    assert done.returncode == 3, done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert "kernels are compiled here" in done.stdout


def test_all_that_the_plan_times_is_a_piece() -> None:
    pytest.importorskip("triton")
    from bench.gpu import pieces

    found = pieces.names(pieces.PARTS)
    assert len(found) == len(set(found)) > 150
    for case in ("all", "small", "quarter", "eighth"):
        assert f"time/qwen3-30b-a3b/{case}" in found
        assert f"time/qwen3-30b-a3b/{case}/recompute" in found
    assert "time/mixtral-8x7b/eighth-quarter" in found
    for tokens in (128, 512, 2048, 8192):
        assert {f"time/qwen3-30b-a3b/quarter-{tokens}", f"time/qwen3-30b-a3b/all-{tokens}"} <= set(found)
    assert {"routing/qwen3-30b-a3b", "routing/deepseek-v3", "model/8192", "model/1024"} <= set(found)
    assert "kernels/qwen3-30b-a3b" in found
    assert "correct/offsets beyond 2^31, rows" in found
