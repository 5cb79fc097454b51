"""A frozen block with a small mixture of experts grafted onto it (FFT-MoE, arXiv 2508.18663)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedmoe_core.layer.moe import MoE
from fedmoe_core.layer.state import INIT_STD


@dataclass(frozen=True)
class GraftSpec:
    """The mixture that is grafted onto every MoE block, as an algorithm declares it for its run.

    Attributes:
        num_experts: M.
        width: bottleneck r of an expert, E_m(h) = U_m relu(V_m h) with V_m (r, H) and U_m (H, r).
        top_k: most experts a token meets; plans may lower it.
    """

    num_experts: int
    width: int
    top_k: int

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_experts or self.width < 1:
            raise ValueError(
                f"cannot graft a mixture with num_experts={self.num_experts}, width={self.width}, top_k={self.top_k}; "
                "give 1 <= top_k <= num_experts and width >= 1"
            )


class Grafted(nn.Module):
    """h' = FFN(h) + sum_m g_m E_m(h), the FFN frozen for good: FFT-MoE [E].

    g is the softmax of the router over the experts, renormalised on the top k. U_m is 0 at first, so the block starts
    as it was.

    Attributes:
        base: the original block, all its parameters without gradient and without statistics.
        experts: the grafted mixture.
    """

    def __init__(self, base: MoE, experts: MoE) -> None:
        super().__init__()
        self.base, self.experts = base, experts
        base.with_stats = base.with_scores = False
        base.set_experts(None)  # drops the sums that were kept for it
        for parameter in base.parameters():
            parameter.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.experts(x)
        return out


def fresh_graft(base: MoE, graft: GraftSpec, *, seed: int) -> Grafted:
    """Graft a fresh mixture onto ``base``, of its device and dtype: V ~ N(0, 2/H), U = 0, drawn on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    hidden, like = base.hidden_size, base.w_out

    def drawn(*shape: int, std: float) -> Tensor:
        drawn_on = torch.empty(shape, dtype=torch.float32, device="cpu")  # whatever torch's defaults are
        return drawn_on.normal_(std=std, generator=generator).to(like)

    experts = MoE.from_dense(
        drawn(graft.num_experts, hidden, std=INIT_STD),
        drawn(graft.num_experts, graft.width, hidden, std=(2 / hidden) ** 0.5),
        like.new_zeros(graft.num_experts, hidden, graft.width),
        graft.top_k,
        activation="relu",
        with_stats=True,
        with_scores=True,
        recompute=base.recompute,
        backend=base.backend,
    )
    return Grafted(base, experts.train(base.training))
