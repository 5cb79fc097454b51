"""Experts in 4 bits on the wire: codes, and the largest magnitude of each block, which give the same codes again.

What a probe rounds to 4 bits anyway need not travel in full. A scale is the largest magnitude m over 7. From codes and
scales alone the device's own rounding could miss a scale by its last bit; with m in place it finds s = m / 7 again, bit
for bit, and with it the codes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedmoe_core.messages.wire.envelope import WireError
from fedmoe_core.model.spec import ParamSpec
from fedmoe_kernels.quantized import Quantized

FORMAT = "int4"
MOST = 7  # the largest code


def coded(param: ParamSpec, rows: Tensor) -> dict[str, Tensor]:
    """Return matrices (n, N, K) in 4 bits, as tensors of a message."""
    if not len(rows):
        return {}
    stored = Quantized.of(rows, FORMAT)
    most = _blocks(rows, stored.block).abs().amax((2, 4))
    return {f"codes/{param.key}": stored.codes, f"most/{param.key}": most}


def decoded(param: ParamSpec, sent: Mapping[str, Tensor], count: int) -> Tensor:
    """Return matrices (n, N, K) that round to the codes that were sent.

    Raises:
        WireError: codes or magnitudes are missing, or of another form.
    """
    shape = (count, *param.shape[1:])
    if not count:
        return torch.empty(shape, dtype=param.dtype)
    codes, most = sent.get(f"codes/{param.key}"), sent.get(f"most/{param.key}")
    if codes is None or most is None or most.dtype != param.dtype or most.dim() != 3:
        raise WireError(f"a task has no codes of {param.key}, or not with magnitudes of {param.dtype}")
    try:
        stored = Quantized(codes, most.float() / MOST, FORMAT)
    except ValueError as error:
        raise WireError(f"a task has codes of {param.key} that cannot be ({error!s:.120})") from None
    if tuple(stored.shape) != shape:
        raise WireError(f"a task has codes of {param.key} of shape {tuple(stored.shape)}, not {shape}")
    rows = stored.dequantize(param.dtype)
    steps = Quantized(codes, torch.ones_like(stored.scale), FORMAT).dequantize(torch.float32)
    blocks = _blocks(rows, stored.block)
    largest = torch.where(_blocks(steps, stored.block).abs() == MOST, most[:, :, None, :, None], blocks.abs())
    signs = torch.where(_blocks(steps, stored.block) < 0, -1.0, 1.0).to(param.dtype)
    return (signs * largest).flatten(3, 4).flatten(1, 2)


def _blocks(rows: Tensor, block: tuple[int, int]) -> Tensor:
    """(n, N / rows, rows, K / columns, columns)."""
    return rows.unflatten(2, (-1, block[1])).unflatten(1, (-1, block[0]))
