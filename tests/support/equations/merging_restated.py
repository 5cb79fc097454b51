"""The equal slots that Flux is compared with, and tokens routed past merged experts."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedmoe_core.algorithms.flux.merging import share_out


def uniform_budgets(merged_LE: np.ndarray, slots: int) -> np.ndarray:
    """Give every layer the same number of slots, as far as it divides: what eq. 1 is measured against."""
    return share_out(np.ones(len(merged_LE)), merged_LE, slots)


def reroute(experts_TK: Tensor, weights_TK: Tensor, alias_E: Tensor) -> tuple[Tensor, Tensor]:
    """Send tokens to representatives: top-k on the originals, then weights that land on one expert are added [E].

    Flux re-maps the gate's index to the merged expert and leaves the router as it is [N]. The sum stands at the first
    of the places, the others hold expert -1 and weight 0.

    Args:
        experts_TK: ids of the router's choice, -1 = none.
        weights_TK: their weights, differentiable.
        alias_E: int64, one row of ``Merge.alias_LE``.
    """
    mapped_TK = torch.where(experts_TK >= 0, alias_E[experts_TK.clamp(min=0)], -1)
    same_TKK = mapped_TK[:, :, None] == mapped_TK[:, None, :]
    repeat_TK = same_TKK.tril(-1).any(dim=2)
    summed_TK = torch.where(same_TKK, weights_TK[:, None, :], 0.0).sum(dim=2)
    gone_TK = repeat_TK | (mapped_TK < 0)
    return torch.where(gone_TK, -1, mapped_TK), torch.where(gone_TK, 0.0, summed_TK)
