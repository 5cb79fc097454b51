"""Copies of a model in 4 or 8 bits, for cheap profiling of which client uses which expert (Flux, arXiv 2508.19078)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from fedmoe_core.update import ParamSpec
from fedmoe_kernels.quantized import Quantized


def quantised_copy(
    params: Mapping[str, Tensor], specs: Sequence[ParamSpec], *, form: str = "int4", group: int = 128
) -> dict[str, Tensor]:
    """Round every matrix of the model to a format and back, in its own dtype; nothing in ``params`` is touched.

    Flux profiles an INT4 copy of the global model [N]. Router rows, vectors (norms, biases) and integers stay as they
    are, because they weigh next to nothing and the router decides what is being measured [E].

    Args:
        params: the model in global coordinates.
        specs: its tensors.
        form: "int4" or "int8".
        group: the most columns that share a scale, a multiple of 32; fewer where it does not divide a matrix.
    """
    copy = {}
    for spec in specs:
        tensor = params[spec.key]
        if not _is_rounded(spec):
            copy[spec.key] = tensor.clone()
            continue
        columns = tensor.shape[-1]
        rounded = Quantized.of(_padded(tensor), form, (1, _group(columns, group))).dequantize(tensor.dtype)
        copy[spec.key] = rounded[..., :columns].reshape(tensor.shape)
    return copy


def quantised_bytes(specs: Sequence[ParamSpec], *, form: str = "int4", group: int = 128) -> int:
    """Count what a client stores to profile: codes and scales of matrices, all else as it is; for the ledger."""
    total = 0
    for spec in specs:
        empty = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
        if _is_rounded(spec):
            total += Quantized.of(_padded(empty), form, (1, _group(spec.shape[-1], group))).bytes
        else:
            total += empty.numel() * empty.itemsize
    return total


def frequency_error(freq_LE: np.ndarray, estimate_LE: np.ndarray) -> float:
    """Return sum |f_est - f| / sum f over all layers and experts: how far estimated activation frequencies are [E].

    Flux reports about 11 % for 4 bits [N] without a formula in what was read; this is twice the share of activations
    that would have to move to make the two equal.
    """
    return float(np.abs(estimate_LE - freq_LE).sum() / freq_LE.sum())


def _is_rounded(spec: ParamSpec) -> bool:
    return spec.kind != "router" and len(spec.shape) >= 2 and spec.dtype.is_floating_point


def _padded(tensor: Tensor) -> Tensor:
    """A stack of matrices whose columns are a multiple of 32; zeros added at the end change no scale."""
    stack = tensor.reshape(-1, *tensor.shape[-2:])
    return pad(stack, (0, -tensor.shape[-1] % 32))


def _group(columns: int, most: int) -> int:
    """The largest multiple of 32 up to ``most`` that divides the padded columns."""
    whole = columns + -columns % 32
    return max(size for size in range(32, max(most, 32) + 1, 32) if whole % size == 0)
