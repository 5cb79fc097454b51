"""How a layer's experts are laid out in slots: the trainable in one stack, the frozen in another or as codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedmoe_kernels.quantized import Quantized


def stack(rows: Mapping[int, Tensor] | Tensor, ids: Sequence[int], like: Tensor) -> Tensor:
    """Make a fresh tensor of the rows ``ids``; with no ids, an empty one shaped as the rows of ``like`` (any, ...).

    Rows are read one after another, so that those made on reading never exist all at once.
    """
    stacked = like.new_empty((0, *like.shape[1:]))
    for place, e in enumerate(ids):
        row = rows[e].detach()
        if not place:
            stacked = row.new_empty((len(ids), *row.shape))
        stacked[place] = row
    return stacked


def frozen_stack(
    rows: Mapping[int, Tensor], coded: Mapping[int, Quantized], ids: Sequence[int], *, bits: int | None, like: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return (values, None) in the dtype of the rows, or (codes, scale) in ``bits`` bits.

    Experts in ``coded``, stacks of one, keep their codes and scales; the others are quantised from their rows.
    """
    if bits is None:
        return stack(rows, ids, like), None
    parts = [coded[e] if e in coded else Quantized.of(rows[e][None], bits, group_of(like.shape[-1])) for e in ids]
    parts = parts or [Quantized.of(stack(rows, (), like), bits, group_of(like.shape[-1]))]
    return torch.cat([p.codes for p in parts]), torch.cat([p.scale for p in parts])


def group_of(columns: int) -> int:
    """Return how many columns share a scale: 128, or the largest smaller multiple of 32 that divides them.

    Raises:
        ValueError: when 32 does not divide them.
    """
    for group in (128, 96, 64, 32):
        if columns % group == 0:
            return group
    raise ValueError(
        f"frozen_bits needs hidden_size and intermediate_size that 32 divides, not {columns}; leave it out"
    )
