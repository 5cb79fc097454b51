"""Which implementation serves a call: the Triton kernels where they can run, plain torch where they cannot."""

from __future__ import annotations

import functools
import warnings

import torch

BACKENDS = ("auto", "torch", "triton")


@functools.cache
def _triton_on(device_type: str) -> str | None:
    try:
        import triton
    except ImportError as missing:
        return f"triton cannot be imported ({missing})"
    if triton.knobs.runtime.interpret:
        return None
    if device_type != "cuda":
        return f"triton has no kernels for {device_type} tensors; move them to a GPU, or set TRITON_INTERPRET=1 to test"
    try:
        capability = torch.cuda.get_device_capability()
    except (RuntimeError, AssertionError) as broken:
        return f"the GPU does not answer ({broken})"
    if torch.version.hip is None and capability < (8, 0):
        return f"the GPU has compute capability {capability[0]}.{capability[1]}; the kernels need 8.0"
    return None


def can_run_triton(device: torch.device) -> str | None:
    """None if Triton kernels can run on tensors of this device, else the reason why not; asked once per device type."""
    return _triton_on(device.type)


@functools.cache
def warn_once(message: str) -> None:
    """Warn, but only the first time that this process says so."""
    warnings.warn(message, stacklevel=3)


def use_triton(backend: str, device: torch.device, refusal: str | None, *, verb: str) -> bool:
    """Whether the Triton kernels serve a call.

    Args:
        backend: "triton", "torch", or "auto": the kernels on a GPU if they can serve, else torch and a warning.
        device: of the tensors.
        refusal: why the kernels do not serve these arguments, naming one and the remedy; None = they do.
        verb: what is called, for the messages.

    Raises:
        ValueError: when "triton" is asked for and cannot serve.
    """
    if backend == "torch" or (backend == "auto" and device.type != "cuda"):
        return False
    reason = refusal or can_run_triton(device)
    if reason is None:
        return True
    if backend == "triton":
        raise ValueError(f"backend='triton' cannot serve {verb}: {reason}; or use backend='auto'")
    warn_once(f"{verb} runs in plain torch, not in Triton kernels: {reason}")
    return False
