"""Which implementation serves a call: the Triton kernels where they can run, plain torch where they cannot."""

from __future__ import annotations

import functools
import importlib
import os
import warnings

import torch

from fedmoe_kernels.tiles.lookup import arch_of_capability

BACKENDS = ("auto", "torch", "triton")  # of the routing
WORTH_SAYING = 1 << 20  # bytes of a copy that is made at every call
EXPERT_BACKENDS = ("auto", "cpu", "triton", "reference")


def can_run_triton(device: torch.device) -> str | None:
    """Return None where the Triton kernels run on tensors of this device, else the reason why not."""
    if device.type == "cpu":
        # What triton read when it was imported decides, and only the environment could tell it.
        if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y"):
            return _missing_triton()
        return "triton has no kernels for cpu tensors; move them to a GPU, or set TRITON_INTERPRET=1 to test"
    if device.type != "cuda":
        return f"there are no kernels for {device.type} tensors; move them to a GPU of NVIDIA"
    if torch.version.hip is not None:
        return "this torch is built for ROCm, and the kernels are for GPUs of NVIDIA"
    if not torch.cuda.is_available():
        return "CUDA is not available to this torch"
    return _gpu_lacks(torch.cuda.current_device() if device.index is None else device.index)


def use_triton(backend: str, device: torch.device, refusal: str | None, *, verb: str) -> bool:
    """Tell whether the Triton kernels serve a call.

    Args:
        backend: "triton"; "torch" or "cpu" for plain torch; or "auto": on a GPU the kernels if they can serve, else
            plain torch and a warning, once for each reason.
        device: of the tensors.
        refusal: why the kernels do not serve these arguments, naming one and the remedy; None = they do.
        verb: what is called, for the messages.

    Raises:
        ValueError: when "triton" is asked for and cannot serve.
    """
    if backend in ("torch", "cpu") or (backend == "auto" and device.type != "cuda"):
        return False
    reason = refusal or can_run_triton(device)
    if reason is None:
        return True
    if backend == "triton":
        raise ValueError(f"backend='triton' cannot serve {verb}: {reason}; or use backend='auto'")
    warn_once(f"{verb} runs in plain torch, not in Triton kernels: {reason}")
    return False


@functools.cache
def warn_once(message: str) -> None:
    """Warn, but only the first time that this process says so."""
    warnings.warn(message, RuntimeWarning, stacklevel=3)


@functools.cache
def _gpu_lacks(index: int) -> str | None:
    try:
        arch_of_capability(*torch.cuda.get_device_capability(index))
    except ValueError as no_table:
        return f"{torch.cuda.get_device_name(index)} has {no_table}"
    return _missing_triton()


@functools.cache
def _missing_triton() -> str | None:
    try:
        importlib.import_module("triton.tools.tensor_descriptor")
    except ImportError as missing:
        return f"triton cannot be imported ({missing}); install the one that goes with this torch"
    return None
