"""What must be known with a number: the GPU, its driver and clocks, the versions, and which sources were measured."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import os
import platform
import re
import statistics
import subprocess
from pathlib import Path
from typing import Any

import torch

from bench.common.checkout import ROOT
from bench.common.clock import Clock
from bench.common.roofline import GPUS, Gpu
from fedmoe_kernels.tiles import lookup
from fedmoe_kernels.tiles.lookup import OVERRIDE, SHIPPED

# What a number depends on, and what took it. A harness that is mended does not make the kernels' numbers void, so the
# two have a hash each; documents and tests have none, and the tiles of this GPU have their own (`tiles`).
_KERNELS, _HARNESS = ("kernels/fedmoe_kernels/**/*.py",), tuple(f"bench/**/*.{end}" for end in ("py", "sh", "c"))
# Where .git does not travel: what the sources were made of, by the environment or by `make gpu-cache`.
COMMIT, COMMIT_FILE = "FEDMOE_COMMIT", ROOT / ".gpu" / "commit"


def about(device: str, *, tiny: bool) -> dict[str, Any]:
    """Collect the fields that every row carries, flat; those without a meaning on a CPU are None there."""
    gpu = device == "cuda"
    return {
        "device": device,
        "rehearsal": tiny or not gpu,
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "driver": _nvidia_smi("driver_version") if gpu else None,
        "cuda": torch.version.cuda if gpu else None,
        "cpu": _cpu_name(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "python": platform.python_version(),
        "commit": commit(),
        "kernels": hashed(*_KERNELS),
        "harness": hashed(*_HARNESS),
        "tiles": tiles(torch.cuda.get_device_name() if gpu else None),
        "date": datetime.date.today().isoformat(),
    }


def machine() -> dict[str, Any]:
    """Describe the CPU and the versions behind a number, without which it means nothing."""
    known = about("cpu", tiny=False)
    named = {name: known[name] for name in ("cpu", "torch", "transformers", "python", "commit", "date")}
    return named | {"capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}


def hashed(*patterns: str) -> str:
    """Compute a hash of files and their names, so that resuming notices a change that git does not know."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in patterns for path in ROOT.glob(pattern)):
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def commit() -> str:
    """Name the commit that is measured: by FEDMOE_COMMIT, by git, by the file that is carried, or "unknown"."""
    named = os.environ.get(COMMIT) or _git("describe", "--always", "--dirty")
    return named or (COMMIT_FILE.read_text().strip() if COMMIT_FILE.exists() else "") or "unknown"


def tiles(gpu_name: str | None) -> str | None:
    """Hash the table that comes before the static tiles here: FEDMOE_TILES, or what ships for the GPU; None = none."""
    shipped = SHIPPED / f"{lookup.slug(gpu_name)}.json" if gpu_name else None
    path = Path(os.environ[OVERRIDE]) if os.environ.get(OVERRIDE) else shipped
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path is not None and path.exists() else None


def slug(name: str) -> str:
    """Turn a GPU's name into a part of a file's name: "NVIDIA H100 80GB HBM3" to "h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower().removeprefix("nvidia ")).strip("-")


def data_sheet(gpu_name: str | None) -> Gpu | None:
    """Find the peaks that percentages refer to, None for a GPU outside the table: its other makes differ."""
    if gpu_name is None or re.search("PCIe|PCIE|NVL|40GB|MIG", gpu_name):
        return None
    return next((gpu for name, gpu in GPUS.items() if re.search(rf"\b{name}\b", gpu_name)), None)


def clocks() -> str | None:
    """Read SM and memory clocks, power and temperature now, as nvidia-smi says; None where it says nothing."""
    return _nvidia_smi("clocks.sm,clocks.mem,power.draw,temperature.gpu") if torch.cuda.is_available() else None


def ceilings(device: str, *, tiny: bool) -> dict[str, float]:
    """Measure what this machine reaches now: a bfloat16 product on random data, and a copy, both directions counted."""
    n, length = (256, 2**20) if tiny else (8192, 2**30)
    a, b = (torch.randn(n, n, device=device).to(torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    product = _seconds(device, lambda: torch.mm(a, b, out=out))
    source = torch.randint(0, 100, (length,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    copy = _seconds(device, lambda: target.copy_(source))
    return {"product TFLOP/s": 2 * n**3 / product / 1e12, "copy TB/s": 8 * length / copy / 1e12}


def _seconds(device: str, run: Any) -> float:
    clock, times = Clock(device), []
    for _ in range(13):
        clock.start()
        first = clock.mark()
        run()
        last = clock.mark()
        times.append(clock.milliseconds(first, last) / 1e3)
    return statistics.median(times[3:])


def _nvidia_smi(query: str) -> str | None:
    """Ask one line about the GPU in use, which CUDA_VISIBLE_DEVICES may have made number 0."""
    unit = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", f"--id={unit}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor()


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*words: str) -> str:
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()
