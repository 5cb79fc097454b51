"""What a split is worth: whether all experts together are the dense model, and what a few of them lose."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from fedmoe_bindings.transformers.split.split import mlp_of

_AT_ONCE = 4  # sequences; the logits of 4 x 128 tokens over 49,152 words are 100 MB


@torch.no_grad()
def next_token_loss(model: PreTrainedModel, tokens_SN: Tensor) -> float:
    """Return the mean loss of the next token in nats."""
    total = 0.0
    for batch_SN in tokens_SN.split(_AT_ONCE):
        logits_SNV = model(input_ids=batch_SN[:, :-1], use_cache=False).logits
        total += float(cross_entropy(logits_SNV.flatten(0, 1).float(), batch_SN[:, 1:].flatten(), reduction="sum"))
    return total / tokens_SN[:, 1:].numel()


@torch.no_grad()
def largest_difference(dense: PreTrainedModel, moe: PreTrainedModel, tokens_SN: Tensor) -> float:
    """Return the largest difference of a logit between two models."""
    worst = 0.0
    for batch_SN in tokens_SN.split(_AT_ONCE):
        want, found = (model(input_ids=batch_SN, use_cache=False).logits.float() for model in (dense, moe))
        worst = max(worst, float((found - want).abs().max()))
    return worst


@contextmanager
def all_experts(moe: PreTrainedModel, layers: Sequence[int], *, equally: bool = False) -> Iterator[None]:
    """Within the block every token goes to every expert of a split model, and all outputs add up; then as it was.

    Args:
        moe: of the MoE families that a split writes.
        layers: that were split.
        equally: with the weights of a router that is 0, all alike.
    """
    blocks: list[Any] = [mlp_of(moe, layer) for layer in layers]
    before = [(block.gate.top_k, block.gate.weight.data, block.experts.down_proj.data) for block in blocks]
    try:
        for block, (k, weight, down) in zip(blocks, before, strict=True):
            count = len(weight)
            block.gate.top_k = count
            block.gate.weight.data = torch.zeros_like(weight) if equally else weight
            block.experts.down_proj.data = down * (count / k)
        yield
    finally:
        for block, (k, weight, down) in zip(blocks, before, strict=True):
            block.gate.top_k, block.gate.weight.data, block.experts.down_proj.data = k, weight, down
