"""Which transformers families fedmoe serves, and where their MoE blocks are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import cast

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedConfig

from fedmoe_core.layer.routing_rule import RoutingRule
from fedmoe_core.layer.state import LayerState

# Where most families keep their tensors.
STOCK = MappingProxyType({"router": "gate.weight", "w_in": "experts.gate_up_proj", "w_out": "experts.down_proj"})


@dataclass(frozen=True)
class Family:
    """One model family whose experts lie as (E, 2I, H) and (E, H, I), gate before up.

    Attributes:
        model_type: ``config.model_type``.
        experts_key: the configuration key that holds the number of experts.
        rule: how its router sends tokens to experts, from a configuration.
        activation: of its experts, as ``fedmoe_kernels.moe_mlp``.
        tensors: where its block keeps each tensor of a ``LayerState``, by our name; a family with biases lists them.
        shared: the block's children that are its shared expert: a module, and a sigmoid gate on it if there is one.
    """

    model_type: str
    experts_key: str
    rule: Callable[[PreTrainedConfig], RoutingRule]
    activation: str = "swiglu"
    tensors: Mapping[str, str] = field(default_factory=lambda: STOCK)
    shared: tuple[str, ...] = ()

    def names(self, block: str) -> dict[str, str]:
        """Return the stock names of a block's tensors by ours; all have experts on dimension 0."""
        return {ours: f"{block}.{place}" for ours, place in self.tensors.items()}


@dataclass(frozen=True)
class Block:
    """One stock MoE block and its place in the model."""

    name: str
    module: nn.Module

    @property
    def gate(self) -> nn.Module:
        """The router, whose ``weight`` is (E, H)."""
        return cast(nn.Module, self.module.gate)

    @property
    def experts(self) -> nn.Module:
        """The stacked experts."""
        return cast(nn.Module, self.module.experts)

    @property
    def num_experts(self) -> int:
        """E."""
        return cast(Tensor, self.gate.weight).shape[0]

    def state(self, family: Family) -> LayerState:
        """Return the block's own tensors under our names."""
        return LayerState.of({ours: self._find(place) for ours, place in family.tensors.items()})

    def _find(self, place: str) -> Tensor:
        inside, _, name = place.rpartition(".")
        return cast(Tensor, getattr(self.module.get_submodule(inside), name))


def norm_topk_prob(config: PreTrainedConfig) -> RoutingRule:
    """Return softmax over all experts, renormalised as the configuration says."""
    return RoutingRule(renormalize=bool(config.norm_topk_prob))


def renormalized(config: PreTrainedConfig) -> RoutingRule:
    """Return softmax over all experts, renormalised over the chosen."""
    return RoutingRule()


FAMILIES = (
    Family("mixtral", "num_local_experts", renormalized),
    Family("olmoe", "num_experts", norm_topk_prob),
    Family("qwen3_moe", "num_experts", norm_topk_prob),
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
            blocks.append(Block(name, module))
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
