"""Where a layer keeps the weights of its slots: stacks of the trainable ones, and of the frozen ones as they are or in
few bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedmoe_kernels.quantized import Quantized


def stack(rows: Mapping[int, Tensor], ids: Sequence[int]) -> Tensor:
    """A fresh tensor of the rows ``ids``; with no ids, an empty one of the same row shape."""
    if ids:
        return torch.stack([rows[e].detach() for e in ids])
    like = next(iter(rows.values()))
    return like.new_empty((0, *like.shape))


def quantized_stack(
    rows: Mapping[int, Tensor], coded: Mapping[int, Quantized], ids: Sequence[int], bits: int
) -> Quantized:
    """The same in ``bits`` bits; experts in ``coded`` (1, N, K each) keep their codes and scales."""
    first = next(iter(rows.values()), None)
    parts = [coded[e] if e in coded else Quantized.of(rows[e][None], bits, group_of(rows[e].shape[-1])) for e in ids]
    if not parts:
        like = first if first is not None else next(iter(coded.values())).dequantize(torch.float32)[0]
        return Quantized.of(like.new_empty((0, *like.shape)), bits, group_of(like.shape[-1]))
    return Quantized(torch.cat([p.codes for p in parts]), torch.cat([p.scale for p in parts]))


def group_of(columns: int) -> int:
    """How many columns share a scale: 128, or the largest multiple of 32 below that divides them.

    Raises:
        ValueError: when 32 does not divide them.
    """
    for group in (128, 96, 64, 32):
        if columns % group == 0:
            return group
    raise ValueError(
        f"frozen_bits needs hidden_size and intermediate_size that 32 divides, not {columns}; leave it out"
    )
