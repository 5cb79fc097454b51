"""The router's losses as megablocks computes them, from what the layers of one model kept.

megablocks keeps it in lists of its module, which all models of a process share. Here each layer keeps its own, so every
function takes the model too, and one model's losses never reach another's.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from fedmoe_bindings.megablocks.arguments import Arguments
from fedmoe_bindings.megablocks.layers import LearnedRouter, ParallelDroplessMLP


def get_load_balancing_loss(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Return (rows of each expert (E,), router probabilities (T, E)) of each training forward, layer by layer."""
    return [kept for module in model.modules() if isinstance(module, ParallelDroplessMLP) for kept in module.records]


def clear_load_balancing_loss(model: nn.Module) -> None:
    """Forget them; once per step, after the backward."""
    for module in model.modules():
        if isinstance(module, ParallelDroplessMLP):
            module.records.clear()


def batched_load_balancing_loss(args: Arguments, model: nn.Module) -> Tensor | float:
    """Return weight * E / (layers * T * k) * the sum over layers and experts of rows times mean probability.

    The source is Switch Transformers (2101.03961), equations 4 to 6 [N], with the factors of megablocks 0.10.0. It
    needs one training forward of every layer since the last `clear_load_balancing_loss`. 0.0 where
    `moe_loss_weight` is 0.

    Raises:
        ValueError: another number of forwards than layers, or layers that saw unlike numbers of tokens.
    """
    if args.moe_loss_weight == 0:
        return 0.0
    kept = get_load_balancing_loss(model)
    if len(kept) != args.layers_here:
        raise ValueError(
            f"there were {len(kept)} training forwards of MoE layers, and num_layers gives {args.layers_here}; call "
            "clear_load_balancing_loss after each step, or correct num_layers"
        )
    counts, scores = zip(*kept, strict=True)
    tokens = scores[0].shape[0]
    if any(score_TE.shape != (tokens, args.moe_num_experts) for score_TE in scores):
        raise ValueError("the layers saw unlike numbers of tokens or experts; compute the loss of each model apart")
    score_X = torch.cat(scores, dim=1)
    score_X = score_X.float() if args.moe_lbl_in_fp32 else score_X
    mean_X = score_X.mean(dim=0) if tokens else score_X.sum(dim=0)
    scale = args.moe_num_experts * args.moe_loss_weight / max(1, args.num_layers * tokens * args.moe_top_k)
    return scale * torch.dot(torch.cat(counts).to(mean_X.dtype), mean_X)


def clear_router_zloss(model: nn.Module) -> None:
    """Forget the routers' logits; once per step, after the backward."""
    for module in model.modules():
        if isinstance(module, LearnedRouter):
            module.records.clear()


def batched_router_zloss(args: Arguments, model: nn.Module) -> Tensor | int:
    """Return (forwards,): weight * the mean over tokens of logsumexp(logits)^2, for each forward of each router.

    The source is ST-MoE (2202.08906), equation 5 [N]. As in megablocks, forwards in evaluation count too, and where
    `moe_zloss_weight` is 0 it warns and returns 0.

    Raises:
        ValueError: there was no forward since the last `clear_router_zloss`.
    """
    if args.moe_zloss_weight == 0:
        warnings.warn("batched_router_zloss is called, and moe_zloss_weight is 0", stacklevel=2)
        return 0
    kept = [logits for module in model.modules() if isinstance(module, LearnedRouter) for logits in module.records]
    if not kept:
        raise ValueError("no router has run since the last clear_router_zloss; run the model first")
    kept = [logits.float() for logits in kept] if args.moe_zloss_in_fp32 else kept
    return args.moe_zloss_weight * torch.stack([torch.logsumexp(logits, dim=1).square().mean() for logits in kept])
