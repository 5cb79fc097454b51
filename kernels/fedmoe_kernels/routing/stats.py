"""Router statistics: what a router would ask for if every expert were there, as sums that add over micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RouterStats:
    """Sums over the tokens of one or more routing calls, of one MoE layer; float64 and detached.

    G_e is the softmax of the raw logits over all E experts, absent ones too, whatever the scoring rule: the router
    score of HFedMoE (arXiv 2601.00583, eqs. 3-4, 11, 14 [N]). Padding tokens, and tokens without one logit above -inf,
    count nowhere. With n tokens, p_e = prob_sum_E / n and KL_e = plogp_sum_E / n - p_e log p_e (eq. 11).
    In the cohort form every field has a leading C dimension.

    Attributes:
        tokens: () number of tokens counted.
        hits_E: (E,) tokens that would choose the expert if all were permitted, by the scoring rule of the call.
        prob_sum_E: (E,) sum of G_e.
        prob_max_E: (E,) largest G_e.
        plogp_sum_E: (E,) sum of G_e log G_e in nats, with 0 log 0 = 0.
        lost_mass: () sum over tokens of the probability of all absent experts.
    """

    tokens: Tensor
    hits_E: Tensor
    prob_sum_E: Tensor
    prob_max_E: Tensor
    plogp_sum_E: Tensor
    lost_mass: Tensor

    @classmethod
    def zeros(
        cls, num_experts: int, *, num_clients: int | None = None, device: torch.device | str = "cpu"
    ) -> RouterStats:
        """Return the statistics of no token: the neutral element of `+`."""
        lead = () if num_clients is None else (num_clients,)
        tokens, lost_mass = torch.zeros(2, *lead, dtype=torch.float64, device=device)
        hits, prob_sum, prob_max, plogp_sum = torch.zeros(4, *lead, num_experts, dtype=torch.float64, device=device)
        return cls(tokens, hits, prob_sum, prob_max, plogp_sum, lost_mass)

    def __add__(self, other: RouterStats) -> RouterStats:
        """Add the statistics of both sets of tokens; neither operand is changed."""
        return RouterStats(
            tokens=self.tokens + other.tokens,
            hits_E=self.hits_E + other.hits_E,
            prob_sum_E=self.prob_sum_E + other.prob_sum_E,
            prob_max_E=torch.maximum(self.prob_max_E, other.prob_max_E),
            plogp_sum_E=self.plogp_sum_E + other.plogp_sum_E,
            lost_mass=self.lost_mass + other.lost_mass,
        )
