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
    rows: Mapping[int, Tensor],
    coded: Mapping[int, Quantized],
    ids: Sequence[int],
    *,
    frozen_format: str | None,
    like: Tensor,
) -> Tensor | Quantized:
    """Stack the rows ``ids`` in their dtype, or in ``frozen_format``.

    Experts in ``coded``, stacks of one, keep their codes and scales; the others are quantised from their rows.
    """
    if frozen_format is None:
        return stack(rows, ids, like)
    parts = [coded[e] if e in coded else Quantized.of(rows[e][None], frozen_format) for e in ids]
    parts = parts or [Quantized.of(stack(rows, (), like), frozen_format)]
    whole = None if parts[0].whole is None else torch.cat([p.whole for p in parts if p.whole is not None])
    return Quantized(torch.cat([p.codes for p in parts]), torch.cat([p.scale for p in parts]), frozen_format, whole)
