"""A dropless layer in plain loops, from a state dict under megablocks' names: what `dMoE` and megablocks must equal."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


def truth(args: Any, tensors: Mapping[str, Tensor], x: Tensor, permitted: Tensor | None = None) -> SimpleNamespace:
    """(out, logits, scores, counts) token by token; `args` has the fields of megablocks' Arguments."""
    flat, E, I = x.reshape(-1, x.shape[-1]), args.moe_num_experts, args.ffn_hidden_size  # noqa: E741
    logits = flat @ tensors["router.layer.weight"].T
    if permitted is not None:
        logits = logits.masked_fill(~permitted, -torch.inf)
    scores = logits.softmax(-1)
    k = args.moe_top_k if permitted is None else min(args.moe_top_k, int(permitted.sum()))
    weights, chosen = scores.topk(k, -1)
    if args.moe_normalize_expert_weights:
        p = args.moe_normalize_expert_weights
        weights = weights / (weights.abs() ** p).sum(-1, keepdim=True) ** (1 / p)
    if args.uniform_expert_assignment:
        chosen = (torch.arange(chosen.numel()) % E).view(chosen.shape)
    w1, v1, w2 = (tensors.get(f"experts.mlp.{name}") for name in ("w1", "v1", "w2"))
    assert w1 is not None
    assert w2 is not None
    out = []
    for token, weight_k, chosen_k in zip(flat, weights, chosen.tolist(), strict=True):
        total = torch.zeros_like(token)
        for weight, e in zip(weight_k, chosen_k, strict=True):
            rows = slice(e * I, (e + 1) * I)
            h = args.activation_fn(w1[rows] @ token)
            h = h if v1 is None else h * (v1[rows] @ token)
            total = total + weight * (h @ w2[rows])
        out.append(total)
    y = torch.stack(out).view(x.shape)
    bias = tensors.get("experts.bias")
    if bias is not None and not args.return_bias:
        y = y + bias
    if args.shared_expert:
        y = _with_shared(args, tensors, x, y)
    return SimpleNamespace(out=y, logits=logits, scores=scores, counts=torch.bincount(chosen.flatten(), minlength=E))


def _with_shared(args: Any, tensors: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    def through(name: str, value: Tensor) -> Tensor:
        bias = tensors.get(f"shared_expert.{name}.bias", 0)
        return value @ tensors[f"shared_expert.{name}.weight"].T + bias

    if "shared_expert.gate_proj.weight" in tensors:
        h = args.activation_fn(through("gate_proj", x)) * through("up_proj", x)
    else:
        h = args.activation_fn(through("up_proj", x))
    shared, k = through("down_proj", h), args.moe_top_k
    return (shared + k * y) / (k + 1) if args.shared_expert_weighted_sum else shared + y


def relative(got: Tensor, want: Tensor) -> float:
    """Relative L2 error; an all-zero truth must be met exactly."""
    assert got.shape == want.shape
    error, size = float((got.detach().double() - want.detach().double()).norm()), float(want.detach().norm())
    return error / size if size else error
