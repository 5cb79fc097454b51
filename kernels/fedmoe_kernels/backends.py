"""Which body runs an operator: whether Triton can serve a device, and how a choice that surprises is announced."""

from __future__ import annotations

import functools
import importlib
import os
import warnings

import torch

BACKENDS = ("auto", "cpu", "triton", "reference")
# Compute capabilities with the shared memory that the tile tables of sm_80, sm_90 and sm_100 take (163, 227, 227 KB a
# block). Their relatives 8.6, 8.9 and 12.x have 99 KB, where a launch of the larger tiles would fail.
_SERVED = ((8, 0), (8, 7), (9, 0), (10, 0), (10, 3))


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors; only the environment at its import can say so."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def can_run_triton(device: torch.device) -> str | None:
    """None when the Triton kernels run on this device, else the reason why not, as part of a sentence."""
    if device.type == "cpu":
        return _without_triton() if interpreting() else "CPU tensors need TRITON_INTERPRET=1 in the environment"
    if device.type != "cuda":
        return f"there are kernels for CUDA devices only, not for {device.type}"
    return _gpu_lacks(torch.cuda.current_device() if device.index is None else device.index)


def arch_of(device: torch.device) -> str:
    """The key of the tile tables for a device that `can_run_triton`."""
    if device.type == "cpu":
        return "interpret"
    return f"sm_{torch.cuda.get_device_capability(device)[0]}0"


def choose(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Which body `moe_mlp` runs, "triton" or "cpu" (the slot loops), for one of "auto", "cpu" and "triton".

    Raises:
        ValueError: for "triton" where it cannot serve, with the reason.
    """
    if backend == "cpu" or (backend == "auto" and device.type == "cpu"):
        return "cpu"
    reason = can_run_triton(device) or _lacks(device, dtype)
    if reason is None:
        return "triton"
    if backend == "triton":
        raise ValueError(f"backend is 'triton', but {reason}; use backend='auto'")
    warn_once("the experts run as loops over slots, which wait for the device and are slow", reason)
    return "cpu"


def warn_once(choice: str, reason: str) -> None:
    """Say what was chosen and why, once per process for each reason."""
    _warn(f"{reason}; {choice}")


def _lacks(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"there are kernels for float32, bfloat16 and float16, not for {dtype}"
    if dtype == torch.bfloat16 and device.type == "cpu":
        return "Triton's interpreter multiplies bfloat16 as raw bits"
    return None


def _without_triton() -> str | None:
    try:
        importlib.import_module("triton.tools.tensor_descriptor")
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    return None


@functools.cache
def _gpu_lacks(index: int) -> str | None:
    if torch.version.hip is not None:
        return "the kernels are for NVIDIA GPUs, and this torch is built for ROCm"
    if not torch.cuda.is_available():
        return "CUDA is not available to this torch"
    gpu = torch.cuda.get_device_properties(index)
    if (gpu.major, gpu.minor) not in _SERVED:
        served = ", ".join(f"{major}.{minor}" for major, minor in _SERVED)
        return f"{gpu.name} is of compute capability {gpu.major}.{gpu.minor}, and there are tiles for {served}"
    return _without_triton()


@functools.cache
def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)
