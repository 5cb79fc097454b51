"""Triton's real runtime without a GPU: `driver.c` plays libcuda, checks launches and starts none.

    library = stand_in.build(folder)               # once; an existing library is kept
    driver = stand_in.activate(library, "sm_90")   # before the first launch, in a process of its own
    kernel[grid](...)                              # tensors of the CPU; nothing reads or writes them
    driver.findings(), driver.counts()

Triton binds, compiles, caches and launches as it would on that GPU. So this also fills TRITON_CACHE_DIR for one: a key
of the cache has triton's files, ptxas, the architecture and the source in it, and nothing of the driver.

`activate` sets TRITON_LIBCUDA_PATH and Triton's active driver for this process, and leaves them: one architecture a
process, because Triton compiles a kernel for the device that it saw first.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

SOURCE = Path(__file__).with_name("driver.c")
SONAME = "libcuda.so.1"  # what Triton links its launcher to, and opens by name


class Limits(NamedTuple):
    """What a GPU allows, from the table of technical specifications in NVIDIA's CUDA programming guide.

    Attributes:
        capability: major and minor.
        shared_block, shared_processor: bytes of shared memory that a block can opt in to, and that an SM has.
        processors: SMs; no limit depends on them.
    """

    capability: tuple[int, int]
    shared_block: int
    shared_processor: int
    processors: int


LIMITS = {
    "sm_80": Limits((8, 0), 163 << 10, 164 << 10, 108),
    "sm_86": Limits((8, 6), 99 << 10, 100 << 10, 84),
    "sm_90": Limits((9, 0), 227 << 10, 228 << 10, 132),
    "sm_100": Limits((10, 0), 227 << 10, 228 << 10, 148),
    "sm_120": Limits((12, 0), 99 << 10, 100 << 10, 170),
}


class Counts(NamedTuple):
    """What was asked of the driver since it was activated or reset, refusals included.

    Attributes:
        launches, descriptors: calls of cuLaunchKernelEx and of cuTensorMapEncodeTiled.
        kernels: launches by the kernel's name.
    """

    launches: int
    descriptors: int
    kernels: dict[str, int]


@dataclass(frozen=True)
class StandIn:
    """The library as Triton's driver of this process."""

    library: ctypes.CDLL
    arch: str

    def findings(self) -> list[str]:
        """Return a line for each call that broke a limit; of more than 256 the rest are one line with their number."""
        total = self.library.stand_in_found()
        lines = [line.decode() for i in range(total) if (line := self.library.stand_in_finding(i)) is not None]
        return lines if len(lines) == total else [*lines, f"and {total - len(lines)} more"]

    def counts(self) -> Counts:
        """Count launches and descriptors."""
        kernels: dict[str, int] = {}
        name, launches = ctypes.c_char_p(), ctypes.c_long()
        at = self.library.stand_in_next(None, ctypes.byref(name), ctypes.byref(launches))
        while at:
            if launches.value:
                kernel = (name.value or b"").decode()
                kernels[kernel] = kernels.get(kernel, 0) + launches.value
            at = self.library.stand_in_next(at, ctypes.byref(name), ctypes.byref(launches))
        return Counts(self.library.stand_in_launches(), self.library.stand_in_maps(), kernels)

    def reset(self) -> None:
        """Forget findings and counts."""
        self.library.stand_in_reset()

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Refuse to load code within it, as a driver does while a stream is captured.

        Waiting, copying and allocating need no refusal: the library has no entry for them, so nothing can call one.
        """
        self.library.stand_in_capture(1)
        try:
            yield
        finally:
            self.library.stand_in_capture(0)


def missing() -> str | None:
    """Tell what this machine lacks, None = nothing: Linux, triton, a C compiler and Python's headers are needed."""
    if not sys.platform.startswith("linux"):
        return "the stand-in driver is a Linux library"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if _compiler() is None:
        return "there is no C compiler (gcc, clang, cc or the one in CC); Triton's launcher needs one too"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return f"Python.h is not in {sysconfig.get_paths()['include']}, and Triton's launcher needs it"
    return None


def _compiler() -> str | None:
    named = os.environ.get("CC")
    return shutil.which(named) if named else next(filter(None, map(shutil.which, ("gcc", "clang", "cc"))), None)


def build(folder: Path) -> Path:
    """Compile the library into `folder`, which is made, and return its path; one that is newer than its source is kept.

    Raises:
        RuntimeError: where something is missing, or the compiler fails; says what.
    """
    library = Path(folder).resolve() / SONAME
    if library.exists() and library.stat().st_mtime > SOURCE.stat().st_mtime:
        return library
    reason = missing()
    if reason is not None:
        raise RuntimeError(f"cannot build the stand-in driver: {reason}")
    import triton

    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    library.parent.mkdir(parents=True, exist_ok=True)
    # Several processes may build at once; each renames a whole file over the last.
    with tempfile.TemporaryDirectory(dir=library.parent) as made:
        out = Path(made) / SONAME
        flags = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-fPIC", "-shared", f"-Wl,-soname,{SONAME}", f"-I{include}")
        command = [_compiler() or "cc", *flags, str(SOURCE), "-o", str(out), "-lpthread"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the C compiler failed on {SOURCE.name}:\n{done.stderr[-4000:]}")
        os.replace(out, library)
    return library


def activate(library: Path, arch: str) -> StandIn:
    """Make the library Triton's driver in this process: device 0 of `arch`, stream 0.

    Call it before the first launch. Kernels of this process can run on no GPU afterwards.

    Raises:
        ValueError: for an unknown architecture.
        RuntimeError: where Triton interprets, a real driver is loaded already, or another architecture is active.
    """
    if arch not in LIMITS:
        raise ValueError(f"no limits are known of {arch!r}; give one of {', '.join(LIMITS)}")
    # Before triton is imported: it reads this once.
    os.environ["TRITON_LIBCUDA_PATH"] = str(Path(library).parent)
    loaded = _loaded(Path(library))
    import triton
    from triton.backends.nvidia.driver import CudaDriver

    if triton.knobs.runtime.interpret:
        raise RuntimeError("Triton interprets kernels in this process (TRITON_INTERPRET); start one without it")
    limits = LIMITS[arch]
    active = triton.runtime.driver._active
    if active is not None and getattr(active, "stands_in_for", None) != arch:
        raise RuntimeError(f"Triton has a driver already ({active}); call activate first, in a process for each arch")
    loaded.stand_in_device(*limits.capability, *limits[1:])

    class Driver(CudaDriver):
        """Triton's own driver, but torch is asked nothing: it may have no CUDA."""

        stands_in_for = arch

        def __init__(self) -> None:
            super().__init__()
            self.get_device_capability = lambda device=0: limits.capability
            self.get_current_device = lambda: 0
            self.set_current_device = lambda device: None
            self.get_current_stream = lambda device=0: 0

    triton.runtime.driver.set_active(Driver())
    return StandIn(loaded, arch)


def _loaded(path: Path) -> ctypes.CDLL:
    """Load the library so that its name finds it from now on, for Triton's launcher is linked to that name alone."""
    library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    by_name = ctypes.CDLL(SONAME)
    if not hasattr(by_name, "stand_in_device"):
        raise RuntimeError(f"this process has loaded a real {SONAME}; activate the stand-in in a process of its own")
    integer, pointer = ctypes.c_int, ctypes.c_void_p
    declared: dict[str, tuple[Any, list[Any]]] = {
        "stand_in_device": (None, [integer] * 5),
        "stand_in_reset": (None, []),
        "stand_in_capture": (None, [integer]),
        "stand_in_launches": (ctypes.c_long, []),
        "stand_in_maps": (ctypes.c_long, []),
        "stand_in_found": (ctypes.c_long, []),
        "stand_in_finding": (ctypes.c_char_p, [ctypes.c_long]),
        "stand_in_next": (pointer, [pointer, pointer, pointer]),
    }
    for name, (result, arguments) in declared.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
