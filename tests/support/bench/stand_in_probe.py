"""A child process that asks the stand-in driver for what it must refuse, and prints what it said, as JSON by name.

Called with the folder of the driver. It has one architecture as Triton's device, and describes others to the library
itself where only their limits count.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

from bench.aot.cases import CASES, launches
from bench.aot.sass import compiled, job_of
from bench.stand_in import driver as stand_in

BFLOAT16, SWIZZLE_128B, NAN = 9, 3, 1
GOOD: dict[str, Any] = {  # a (100, 64, 2048) tensor in boxes of (1, 128, 64), axes from the last to the first
    "address": 1 << 20,
    "dims": (2048, 64, 100),
    "strides": (4096, 64 * 4096),
    "box": (64, 128, 1),
    "steps": (1, 1, 1),
    "interleave": 0,
    "swizzle": SWIZZLE_128B,
    "type": BFLOAT16,
    "fill": 0,
    "rank": 3,
    "map": 0,
}
MAPS: dict[str, dict[str, Any]] = {
    "good": {},
    "filled with NaN": {"fill": NAN},
    "a box of 257": {"box": (64, 257, 1)},
    "a box of 0": {"box": (64, 0, 1)},
    "an inner box wider than the swizzle": {"box": (128, 128, 1)},
    "an inner box of 24 bytes": {"box": (12, 128, 1)},
    "a box larger than shared memory": {"box": (64, 256, 8)},
    "a stride of 4104": {"strides": (4104, 64 * 4104)},
    "a stride of 2^40": {"strides": (4096, 1 << 40)},
    "a stride less than a row": {"strides": (2048, 64 * 4096)},
    "an address off 16 bytes": {"address": (1 << 20) + 8},
    "a null address": {"address": 0},
    "a size of 0": {"dims": (2048, 0, 100)},
    "a size over 2^32": {"dims": (2048, 64, (1 << 32) + 1)},
    "rank 0": {"rank": 0},
    "rank 6": {"rank": 6},
    "an element stride of 9": {"steps": (1, 9, 1)},
    "an unknown type": {"type": 99},
    "NaN for integers": {"type": 1, "fill": NAN},
    "interleaved by 32 bytes": {"interleave": 2},
    "a map off its alignment": {"map": 8},
}


class Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        *((name, ctypes.c_uint) for name in ("x", "y", "z", "block_x", "block_y", "block_z", "shared")),
        *(("stream", ctypes.c_void_p), ("attributes", ctypes.c_void_p), ("count", ctypes.c_uint)),
    ]


@triton.jit
def _product(x, SIZE: tl.constexpr):
    at = x + tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(at, tl.dot(tl.load(at), tl.load(at)).to(tl.bfloat16))


said: dict[str, Any] = {}


@contextmanager
def asked(driver: stand_in.StandIn, name: str) -> Iterator[dict[str, Any]]:
    """Keep what the driver found under `name`, and what the body adds."""
    driver.reset()
    kept: dict[str, Any] = {}
    yield kept
    said[name] = kept | {"findings": driver.findings()}


def encode(driver: stand_in.StandIn, name: str, changes: dict[str, Any]) -> None:
    given = GOOD | changes
    room = ctypes.create_string_buffer(512)
    map_at = -(-ctypes.addressof(room) // 128) * 128 + given["map"]
    arrays = [(ctypes.c_uint64 * 6)(*given[key]) for key in ("dims", "strides")]
    arrays += [(ctypes.c_uint32 * 6)(*given[key]) for key in ("box", "steps")]
    with asked(driver, name) as kept:
        kept["result"] = driver.library.cuTensorMapEncodeTiled(
            ctypes.c_void_p(map_at),
            *(given["type"], given["rank"], ctypes.c_void_p(given["address"]), *arrays),
            *(given["interleave"], given["swizzle"], 2, given["fill"]),
        )


def launch(driver: stand_in.StandIn, name: str, function: ctypes.c_void_p, **changes: int) -> None:
    sizes = {"x": 1, "y": 1, "z": 1, "block_x": 128, "block_y": 1, "block_z": 1, "shared": 0} | changes
    arguments = (ctypes.c_void_p * 1)()
    with asked(driver, name) as kept:
        kept["result"] = driver.library.cuLaunchKernelEx(ctypes.byref(Config(**sizes)), function, arguments, None)


def shared_memory(driver: stand_in.StandIn, code: bytes) -> None:
    """Ask for as much shared memory as each architecture has, and for one byte more."""
    for arch, limits in stand_in.LIMITS.items():
        driver.library.stand_in_device(*limits.capability, *limits[1:])
        function, module = ctypes.c_void_p(), ctypes.c_void_p()
        driver.library.cuModuleLoadData(ctypes.byref(module), code)
        driver.library.cuModuleGetFunction(ctypes.byref(function), module, b"_product")
        launch(driver, f"{arch} before opt-in", function, shared=49153)
        for more in (0, 1):
            with asked(driver, f"{arch} attribute {more}") as kept:
                kept["result"] = driver.library.cuFuncSetAttribute(function, 8, limits.shared_block + more)
            launch(driver, f"{arch} launch {more}", function, shared=limits.shared_block + more)
        encode(driver, f"{arch} map", {})


def main(folder: Path) -> None:
    driver = stand_in.activate(stand_in.build(folder), "sm_90")
    try:
        stand_in.activate(stand_in.build(folder), "sm_80")
    except RuntimeError as refused:
        said["another architecture"] = str(refused)
    square = torch.empty(64 * 64, dtype=torch.bfloat16)
    with asked(driver, "triton, good") as kept:
        code = _product[(3, 65535)](square, 64)
        kept["counts"] = driver.counts()._asdict()
        kept["registers"] = [code.n_regs, compiled_registers(code.asm["cubin"])]
    for name, grid in {"y": (1, 65536), "z": (1, 1, 65536)}.items():
        with asked(driver, f"triton, a grid too large along {name}") as kept:
            try:
                _product[grid](square, 64)
            except RuntimeError as refused:
                kept["error"] = str(refused)
    case = CASES[0]
    before = driver.counts().launches
    last = launches(case, "sm_90")["forward"][-1]
    meta = {name: torch.empty_like(v, device="cpu") if torch.is_tensor(v) else v for name, v in last.args.items()}
    last.kernel[last.grid](**meta, **last.options)
    entries = {path.name for path in Path(triton.knobs.cache.dir).iterdir()}
    compiled(job_of(last, "sm_90"))
    said["compiled again"] = sorted({path.name for path in Path(triton.knobs.cache.dir).iterdir()} - entries)
    said["launched"] = driver.counts().launches - before
    for name, changes in MAPS.items():
        encode(driver, name, changes)
    function = ctypes.c_void_p(code.function)
    sizes: dict[str, dict[str, int]] = {
        "no program": {"x": 0},
        "a grid of 2^31": {"x": 1 << 31},
        "1056 threads": {"block_x": 1056},
        "65 along z": {"block_x": 1, "block_z": 65},
    }
    for name, changed in sizes.items():
        launch(driver, name, function, **changed)
    with asked(driver, "no machine code") as kept:
        kept["result"] = driver.library.cuModuleLoadData(ctypes.byref(ctypes.c_void_p()), b"\0" * 64)
    driver.reset()
    for _ in range(300):
        driver.library.cuLaunchKernelEx(ctypes.byref(Config()), function, (ctypes.c_void_p * 1)(), None)
    said["many"] = [len(driver.findings()), driver.findings()[-1]]
    shared_memory(driver, code.asm["cubin"])
    print(json.dumps(said))


def compiled_registers(cubin: bytes) -> int:
    """Registers as the compiler's own tool reads them."""
    from bench.aot.listing import usage

    return usage(cubin)[0]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
