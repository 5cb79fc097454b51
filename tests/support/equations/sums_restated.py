"""The exact sums and the checks in whole tensors, as they are defined: what the blocks are compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def add_whole(
    total: Tensor, delta: Tensor, weights: Sequence[int], rows: Sequence[int], scale_bits: int, *, share: float = 1.0
) -> None:
    """Add round(weight * share * delta * 2**scale_bits), half to even, in float64, to rows of ``total``."""
    if not rows:
        return
    factor_B = (
        torch.tensor(weights, dtype=torch.float64).mul_(2.0**scale_bits * share).view(-1, *[1] * (delta.dim() - 1))
    )
    scaled = delta.detach().to(torch.float64) * factor_B
    total.index_add_(0, torch.tensor(rows), scaled.round().to(torch.int64))
