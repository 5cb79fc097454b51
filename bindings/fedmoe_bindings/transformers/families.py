"""Which transformers families fedmoe serves, and where their MoE blocks are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Family:
    """One model family whose experts lie as (E, 2I, H) and (E, H, I), without bias, and whose router is softmax.

    Attributes:
        model_type: ``config.model_type``.
        experts_key: the configuration key that holds the number of experts.
        renormalize: whether the chosen weights are divided by their sum.
    """

    model_type: str
    experts_key: str
    renormalize: Callable[[PreTrainedConfig], bool]


@dataclass(frozen=True)
class Block:
    """One stock MoE block: its place in the model, its router and its experts."""

    name: str
    gate: nn.Module
    experts: nn.Module

    @property
    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """Router (E, H), w_in (E, 2I, H) and w_out (E, H, I)."""
        router, w_in, w_out = self.gate.weight, self.experts.gate_up_proj, self.experts.down_proj
        return cast(Tensor, router), cast(Tensor, w_in), cast(Tensor, w_out)

    @property
    def num_experts(self) -> int:
        return self.weights[0].shape[0]


def _norm_topk_prob(config: PreTrainedConfig) -> bool:
    return bool(config.norm_topk_prob)


def _always(config: PreTrainedConfig) -> bool:
    return True


FAMILIES = (
    Family("mixtral", "num_local_experts", _always),
    Family("olmoe", "num_experts", _norm_topk_prob),
    Family("qwen3_moe", "num_experts", _norm_topk_prob),
)
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def family_of(config: PreTrainedConfig) -> Family:
    """Find the family of a configuration.

    Raises:
        ValueError: the family is not served, by name; or its options ask for what fedmoe does not do.
    """
    served = ", ".join(family.model_type for family in FAMILIES)
    family = next((f for f in FAMILIES if f.model_type == config.model_type), None)
    if family is None:
        if any(getattr(config, key, None) for key in _EXPERT_COUNTS):
            raise ValueError(f"the MoE family {config.model_type!r} is not supported yet; use one of {served}")
        raise ValueError(f"a {config.model_type!r} model has no MoE layers; use a model of one of {served}")
    if config.hidden_act != "silu":
        raise ValueError(f"experts with hidden_act={config.hidden_act!r} are not supported; use a model with silu")
    if getattr(config, "router_jitter_noise", 0.0):
        raise ValueError("router jitter is not supported; set router_jitter_noise=0 in the model's configuration")
    return family


def sparse_blocks(model: nn.Module, config: PreTrainedConfig) -> tuple[Block, ...]:
    """List the stock MoE blocks in depth order; dense layers among them (``mlp_only_layers``) are passed over.

    Raises:
        ValueError: the model has no MoE block.
    """
    blocks = []
    for name, module in model.named_modules():
        gate, experts = getattr(module, "gate", None), getattr(module, "experts", None)
        if not isinstance(gate, nn.Module) or not isinstance(experts, nn.Module):
            continue
        if hasattr(gate, "weight") and hasattr(experts, "gate_up_proj"):
            blocks.append(Block(name, gate, experts))
    if not blocks:
        raise ValueError(
            f"this {config.model_type!r} model has no MoE layers; check mlp_only_layers and decoder_sparse_step"
        )
    return tuple(blocks)


def layer_masks(permitted: np.ndarray | Tensor, blocks: tuple[Block, ...]) -> np.ndarray:
    """Make a checked bool (L, E) mask from one of shape (L, E) or, for all layers alike, (E,).

    Raises:
        ValueError: another dtype or shape, or a layer without any expert.
    """
    mask = permitted.cpu().numpy() if isinstance(permitted, Tensor) else np.asarray(permitted)
    shape = (len(blocks), blocks[0].num_experts)
    if mask.dtype != np.bool_ or mask.shape not in (shape, shape[1:]):
        raise ValueError(f"permitted is {mask.dtype} of shape {mask.shape}; give a bool mask of shape {shape}")
    mask_LE = np.broadcast_to(mask, shape)
    empty = np.flatnonzero(~mask_LE.any(axis=1))
    if empty.size:
        raise ValueError(f"MoE layer {empty[0]} has no permitted expert; permit at least one in every layer")
    return mask_LE
