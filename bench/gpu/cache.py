"""Triton's cache of the GPU run, made where there is no GPU, so that a machine that has one compiles nothing.

    make gpu-cache                              # build, check and pack into .gpu/, which git ignores: carry it along
    python -m bench.gpu.cache build [--part kernels ...] [--jobs 2]
    python -m bench.gpu.cache unpack            # there: says at once whether the cache is for this triton
    python -m bench.gpu.cache check             # here: every launch of `first` and `second` again; exits 1 on a miss
    python -m bench.gpu.cache fill              # there: compile on the other cores while something else is timed

What is launched is found by launching it, in processes whose driver is a stand-in (bench/stand_in). A key of the cache
has triton's files, ptxas, the options and the source in it: no path, no GPU, no driver. The Python must be the other
machine's (3.12 by default), for Triton's launchers are modules of it.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from bench.common import checkout

BOX = checkout.ROOT / ".gpu"
ARCHIVE, WHEELS = BOX / "triton.txz", "wheels"  # the folder is beside the archive
CACHE = Path(os.environ.get("TRITON_CACHE_DIR", str(checkout.ROOT / "runs" / "triton")))
PEERS = checkout.ROOT / "runs" / "peers"
# What a launch or the tuner's gates read; PTX and LLVM's form are two thirds of the bytes.
SUFFIXES = (".cubin", ".json", ".so", ".ttir", ".ttgir")
NOT_READY = 3
# Pure Python wheels that pip can fetch; what it cannot is named.
FETCHED = ("liger-kernel",)
NOT_FETCHED = (
    "scattermoe (not on PyPI: put its package folder into .gpu/peers)",
    "triton_kernels (OpenAI's, in triton's repository; PyPI has another project of that name)",
    "sonic-moe (needs nvidia-cutlass-dsl, 71 MB)",
    "megablocks (needs nvcc)",
)


def facts() -> dict[str, Any]:
    """Return all that a key has besides the kernel, and what names the launchers: must agree on both machines."""
    import triton
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.backends.nvidia.compiler import get_ptxas_version
    from triton.runtime.cache import triton_key

    found = {"triton": triton.__version__, "files of triton": short(triton_key())}
    found |= {"ptxas": short(get_ptxas_version(90)), "environment": get_cache_invalidating_env_vars()}
    return found | {"Python's modules": sysconfig.get_config_var("EXT_SUFFIX")}


def kernels() -> str:
    """Hash the sources that machine code is made of: all of the kernels' package, tables of tiles included."""
    folder = checkout.ROOT / "kernels" / "fedmoe_kernels"
    return short("".join(f"{path.relative_to(folder)}\n{path.read_text()}" for path in sorted(folder.rglob("*.py"))))


def short(text: str) -> str:
    """Hash a text to sixteen letters."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def launch_all(pieces: Sequence[str], jobs: int, library: str) -> dict[str, Any]:
    """Launch all these pieces under the stand-in driver; kernels found and not found by key, and errors."""
    from bench.gpu import pieces as gpu_pieces

    found: dict[str, Any] = {"hits": set(), "misses": set(), "kernels": {}, "errors": {}, "launches": 0}
    # A process has one driver for life, and a fork of one that has none may load it.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=gpu_pieces.begin, initargs=(library,)) as pool:
        running = {pool.submit(gpu_pieces.launch, name): name for name in pieces}
        for count, done in enumerate(as_completed(running), 1):
            name = running[done]
            error = done.exception()
            if error is not None:
                found["errors"][name] = f"{type(error).__name__}: {error}"[:300]
                continue
            piece = done.result()
            found["launches"] += piece["launches"]
            found["kernels"] |= piece["kernels"]
            found["hits"] |= set(piece["hits"])
            found["misses"] |= set(piece["misses"])
            if piece["error"]:
                found["errors"][name] = piece["error"]
            if count % 25 == 0:
                print(f"{count} of {len(pieces)} pieces, {len(found['misses'])} compiled", flush=True)
    return found


def build(pieces: Sequence[str], jobs: int, out: Path) -> int:
    """Compile into CACHE and pack it, with the commit and the wheels of peers beside it."""
    from bench.common.machine import commit  # imports torch, for which the first seconds on a GPU machine are too few

    began = time.monotonic()
    found = compiled(pieces, jobs)
    about = facts() | {"pieces": len(pieces), "variants": len(found["hits"] | found["misses"]), "commit": commit()}
    about |= {"kernels": kernels()}
    out.parent.mkdir(parents=True, exist_ok=True)
    pack(out, about)
    (out.parent / "commit").write_text(about["commit"] + "\n")
    print(f"{out}: {out.stat().st_size / 2**20:.1f} MiB, {about['variants']} kernels, {time.monotonic() - began:.0f} s")
    return tell(found["errors"])


def compiled(pieces: Sequence[str], jobs: int, cache: Path = CACHE) -> dict[str, Any]:
    """Launch everything with the cache open."""
    from bench.stand_in import driver as stand_in

    os.environ["TRITON_CACHE_DIR"] = str(cache)
    with tempfile.TemporaryDirectory() as folder:
        return launch_all(pieces, jobs, str(stand_in.build(Path(folder))))


def tell(errors: dict[str, str]) -> int:
    """Print what could not be launched; 1 where anything could not."""
    for name, error in errors.items():
        print(f"could not be launched: {name}: {error}")
    return 1 if errors else 0


def pack(out: Path, about: dict[str, Any]) -> None:
    """Pack what a launch reads, and each launcher under both names that Python's `platform` may give it."""
    for path in CACHE.glob("*/*.so"):
        twin(path)
    with tarfile.open(out, "w:xz", preset=6) as tar:
        raw = json.dumps(about, indent=1).encode()
        entry = tarfile.TarInfo("about.json")
        entry.size = len(raw)
        tar.addfile(entry, io.BytesIO(raw))
        for path in sorted(path for path in CACHE.glob("*/*") if path.suffix in SUFFIXES):
            tar.add(path, str(path.relative_to(CACHE)))


def twin(path: Path) -> None:
    """Copy a launcher to the folder that it has where `file` is installed, or is not: then `platform` says other words.

    The folder's name is a hash of the module's source and of those words, and the source lies beside no module. So
    what Triton hashed is kept by `pieces.begin` in a text beside it.
    """
    source = path.with_name("hashed.txt")
    if not source.exists():
        return
    for words in ("x86_64,Linux,64bit,ELF", "x86_64,Linux,64bit,"):
        digest = hashlib.sha256((source.read_text() + words).encode()).digest()
        other = CACHE / base64.b32encode(digest).decode().rstrip("=")
        other.mkdir(exist_ok=True)
        if not (other / path.name).exists():
            shutil.copy2(path, other / path.name)


def unpack(archive: Path, cache: Path = CACHE) -> int:
    """Unpack the carried cache and wheels; 3 where something is to be compiled here all the same, in one sentence."""
    for wheel in unpack_wheels(archive.parent):
        print(f"peer unpacked: {wheel}")
    if not archive.exists():
        print(f"there is no carried cache ({archive}); kernels are compiled here, or run `make gpu-cache` before")
        return NOT_READY
    try:
        with tarfile.open(archive) as tar:
            member = tar.next()
            data = tar.extractfile(member) if member is not None and member.name == "about.json" else None
            if data is None:
                raise tarfile.TarError("it does not begin with about.json")
            about = json.loads(data.read())
            here = facts()
            off = [name for name in here if about.get(name) != here[name]]
            if off:
                found = f"{about.get(off[0])}; here {here[off[0]]}"
                print(f"the carried cache is of another {off[0]} ({found}); kernels are compiled here")
                return NOT_READY
            _extract(tar, cache)
    except (tarfile.TarError, ValueError, EOFError, OSError) as error:
        reason = " ".join(str(error).split())[:120]  # tarfile writes a line for each way that it tried
        print(f"the carried cache cannot be read ({reason}); kernels are compiled here")
        return NOT_READY
    for path in cache.glob("*/__grp__*.json"):  # they hold absolute paths
        names = json.loads(path.read_text())["child_paths"]
        path.write_text(json.dumps({"child_paths": {name: str(path.parent / name) for name in names}}))
    if about.get("kernels") != kernels():
        print(f"the carried cache is of other sources, of {about['commit']}; kernels that changed are compiled here")
        return NOT_READY
    print(f"the carried cache is of this triton: {about['variants']} kernels of commit {about['commit']}")
    return 0


def _extract(tar: tarfile.TarFile, folder: Path) -> None:
    """Write an archive's files below a folder, and nothing else; tarfile's own filter is not in Python 3.11.0 to .3."""
    below = folder.resolve()
    for member in tar:
        data, place = tar.extractfile(member) if member.isfile() else None, (below / member.name).resolve()
        if data is None or not place.is_relative_to(below):
            raise tarfile.TarError(f"it holds {member.name}, which is not a file below its folder")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data.read())


def unpack_wheels(box: Path) -> list[str]:
    """Unpack the carried wheels, which are pure Python, into a folder that is on the parts' path; their names."""
    found = sorted((box / WHEELS).glob("*.whl"))
    for wheel in found:
        with zipfile.ZipFile(wheel) as packed:
            packed.extractall(PEERS)
    return [wheel.name for wheel in found]


def check(pieces: Sequence[str], jobs: int, archive: Path) -> int:
    """Unpack into a new folder, launch everything again, and say how much was not found there."""
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        if unpack(archive, cache):
            return 1
        found = compiled(pieces, jobs, cache)
    print(f"{found['launches']} launches: {len(found['hits'])} kernels found, {len(found['misses'])} not found")
    for key in sorted(found["misses"]):
        print(f"not found: {found['kernels'][key]}")
    return 1 if tell(found["errors"]) or found["misses"] or not found["hits"] else 0


def wheels(box: Path) -> int:
    """Fetch the wheels of peers that are pure Python; what pip cannot fetch is named."""
    (box / WHEELS).mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    code = 0
    for name in FETCHED:
        code |= subprocess.run([*command, "--dest", str(box / WHEELS), name]).returncode
    for name in NOT_FETCHED:
        print(f"not fetched: {name}")
    return code


def main() -> int:
    """Do one of the things above."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.cache", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("build", "unpack", "check", "fill", "wheels"))
    parser.add_argument("--archive", type=Path, default=ARCHIVE)
    parser.add_argument("--part", action="append", help="of pieces.py; default: all that both commands launch")
    parser.add_argument("--only", default="", help="pieces whose name has this in it")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1) - 2))
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    chosen, _ = parser.parse_known_args()  # a part of `first` gets the words of all parts
    if chosen.device == "cpu":
        print("skipped: nothing is compiled for a CPU")
        return 0
    if chosen.what == "unpack":
        return unpack(chosen.archive)
    if chosen.what == "wheels":
        return wheels(chosen.archive.parent)
    unpack_wheels(chosen.archive.parent)
    sys.path.append(str(PEERS))  # and of the processes that are started here
    from bench.gpu import pieces as gpu_pieces

    pieces = [name for name in gpu_pieces.names(chosen.part or gpu_pieces.PARTS) if chosen.only in name]
    if chosen.what == "build":
        return build(pieces, chosen.jobs, chosen.archive)
    if chosen.what == "check":
        return check(pieces, chosen.jobs, chosen.archive)
    return tell(compiled(pieces, chosen.jobs)["errors"])


if __name__ == "__main__":
    sys.exit(main())
