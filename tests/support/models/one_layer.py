"""An adapter with one MoE layer and nothing else."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from fedmoe_core.layer.moe import MoE

H, E = 6, 5


def made(*held: int, top_k: int = 2) -> MoE:
    torch.manual_seed(0)
    permitted = np.isin(np.arange(E), held) if held else None
    return MoE(H, 8, E, top_k, permitted=permitted, dtype=torch.float64)


class OneLayer:
    """As much of an adapter as a local step needs."""

    def __init__(self) -> None:
        self.moe = (made(),)
        self.model = nn.Sequential(*self.moe)

    def loss(self, x: Tensor, **_: object) -> Tensor:
        return self.model(x).square().mean()
