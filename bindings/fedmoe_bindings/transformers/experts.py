"""use_fedmoe: a stock transformers model whose experts run on ``moe_mlp``, through transformers' own interface."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from fedmoe_bindings.transformers.families import Block, Family, family_of, layer_masks, sparse_blocks
from fedmoe_core.layer.routing_rule import RoutingRule
from fedmoe_kernels.experts.moe_mlp import moe_mlp
from fedmoe_kernels.routing.record import Routing
from fedmoe_kernels.routing.route import route
from fedmoe_kernels.slot_map import SlotMap

NAME = "fedmoe"
_HOOK = "_fedmoe_permitted_hook"
_SLOTS = "_fedmoe_slot_map"


def use_fedmoe(model: PreTrainedModel, *, permitted: np.ndarray | Tensor | None = None) -> PreTrainedModel:
    """Run a stock model's experts on fedmoe, in place; weights, names and saved files stay transformers' own.

    Args:
        model: a Qwen3-MoE, OLMoE or Mixtral model.
        permitted: bool (L, E), or (E,) for all layers alike: route among these experts only, exactly as the sub-model
            that has no others (the mask acts before the scores are normalised). None = all, and lifts an earlier mask.
            The weights of the others stay in memory; ``extract_submodel`` makes a model that does not even hold them.

    Returns:
        The same model.

    Raises:
        ValueError: the family is not served, by name, or the mask does not fit. transformers itself accepts an experts
            implementation on models that never call it and says nothing; here that is an error.

    Example:
        >>> from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
        >>> heads = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=16)
        >>> experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
        >>> sizes = dict(vocab_size=64, hidden_size=32, num_hidden_layers=1, intermediate_size=32)
        >>> model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, **experts)).eval()
        >>> tokens = torch.arange(8)[None]
        >>> before = model(tokens).logits
        >>> torch.allclose(use_fedmoe(model)(tokens).logits, before, atol=1e-5)
        True
    """
    # transformers has no public question for this; the method with the underscore is the one its own setter asks.
    if not isinstance(model, PreTrainedModel) or not model._can_set_experts_implementation():
        config = getattr(model, "config", None)
        if config is not None:
            family_of(config)
        raise ValueError(f"{type(model).__name__} does not use transformers' experts interface; fedmoe cannot serve it")
    family = family_of(model.config)
    blocks = sparse_blocks(model, model.config)
    for block in blocks:
        _check_layout(block)
    masks = None if permitted is None else layer_masks(permitted, blocks)
    ALL_EXPERTS_FUNCTIONS.register(NAME, fedmoe_experts)
    model.set_experts_implementation(NAME)
    for layer, block in enumerate(blocks):
        _remember_slots(block.experts, model.device)
        _permit(block.gate, None if masks is None else masks[layer], family, family.rule(model.config))
    return model


def fedmoe_experts(self: nn.Module, hidden_TH: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Run all experts in expert order, ids outside [0, E) = no row: the experts function registered as "fedmoe".

    Args:
        self: the experts module; transformers calls this function instead of its forward.
        hidden_TH: tokens.
        experts_TK: int64 expert ids.
        weights_TK: routing weights, in the family's own dtype.

    Returns:
        (T, H) in the dtype of ``hidden_TH``.
    """
    everyone = getattr(self, _SLOTS, None)
    if everyone is None or everyone.slot_of_expert.device != hidden_TH.device:
        everyone = _remember_slots(self, hidden_TH.device)
    routing = Routing.from_topk(experts_TK, weights_TK, everyone)
    w_in, w_out = cast(Tensor, self.gate_up_proj), cast(Tensor, self.down_proj)
    if (offered := getattr(self, "_fedmoe_lora", None)) is not None:
        return moe_mlp(hidden_TH, routing, w_in.detach(), w_out.detach(), lora=offered()).to(hidden_TH.dtype)
    return moe_mlp(hidden_TH, routing, w_in, w_out).to(hidden_TH.dtype)


def _remember_slots(experts: nn.Module, device: torch.device) -> SlotMap:
    """Let slot b hold expert b; kept on the module, as making it waits for the device."""
    num_experts = cast(Tensor, experts.gate_up_proj).shape[0]
    everyone = SlotMap(torch.arange(num_experts, device=device), num_experts)
    setattr(experts, _SLOTS, everyone)
    return everyone


def _check_layout(block: Block) -> None:
    """Refuse a module without the flags that transformers' decorator leaves: it would never call us."""
    want = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True}
    for flag, value in want.items():
        if getattr(block.experts, flag, None) is not value:
            raise ValueError(
                f"{block.name}.experts has {flag}={getattr(block.experts, flag, 'unset')}; fedmoe needs {flag}={value}"
            )


def _permit(gate: nn.Module, permitted_E: np.ndarray | None, family: Family, rule: RoutingRule) -> None:
    """Re-route a stock router's answer among the permitted experts; None takes an earlier mask away."""
    earlier = getattr(gate, _HOOK, None)
    if earlier is not None:
        earlier.remove()
        delattr(gate, _HOOK)
    if permitted_E is None:
        return
    slot_map = SlotMap.build(torch.from_numpy(permitted_E.copy()))
    correction = family.tensors.get("correction_bias", "").removeprefix("gate.")

    def reroute(gate: nn.Module, _: tuple[Tensor, ...], answer: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        nonlocal slot_map
        logits_TE, stock_weights, _stock_experts = answer
        if slot_map.slot_of_expert.device != logits_TE.device:
            slot_map = slot_map.to(logits_TE.device)
        routing = route(
            logits_TE,
            cast(int, gate.top_k),
            permitted_E=slot_map,
            scoring=rule.scoring,
            renormalize=rule.renormalize,
            bias_E=getattr(gate, correction) if correction else None,
            groups=rule.groups,
            scale=rule.scale,
        )
        # transformers' own mark for "no expert here" is the id E, which its eager experts skip too.
        experts_TK = torch.where(routing.experts_TK < 0, logits_TE.shape[-1], routing.experts_TK)
        return logits_TE, routing.weights_TK.to(stock_weights.dtype), experts_TK

    setattr(gate, _HOOK, gate.register_forward_hook(reroute))
