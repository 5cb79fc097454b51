"""The Switch load-balance loss of a model's MoE layers, for the central warm-up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedmoe_core.layer import MoE


def balance_loss(layers: Sequence[MoE]) -> Tensor:
    """Mean over layers of E * sum_e f_e P_e, a differentiable scalar: 1 when perfectly balanced, up to E.

    f_e is the share of top-k choices that fall on expert e (a constant), P_e the mean softmax probability of e, both
    over the real tokens of the last forward and over the whole router, absent experts included. Switch Transformer
    (arXiv 2101.03961) eqs. 4-6 [P], with f over k choices as in later models.

    Set ``keep_logits`` of every layer before the forward. The logits are released here, so call once per forward.

    Raises:
        ValueError: a layer kept no logits.
    """
    losses = []
    for number, layer in enumerate(layers):
        logits_TE, layer.last_logits_TE = layer.last_logits_TE, None
        if logits_TE is None:
            raise ValueError(f"MoE layer {number} kept no logits; set keep_logits on every layer before the forward")
        prob_E = logits_TE.float().softmax(dim=-1).mean(dim=0)
        chosen = logits_TE.detach().topk(layer.top_k, dim=-1).indices.flatten()
        share_E = torch.bincount(chosen, minlength=layer.num_experts) / max(chosen.numel(), 1)
        losses.append(layer.num_experts * (share_E * prob_E).sum())
    return torch.stack(losses).mean()
