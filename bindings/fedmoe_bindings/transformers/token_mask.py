"""How a batch's token mask reaches the MoE layers inside a transformers model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fedmoe_core.layer.moe import MoE

Args, Options = tuple[Any, ...], dict[str, Any]  # what a module was called with
# The keyword under which a forward's token mask, bool (T,), travels through the model.
TOKEN_MASK = "fedmoe_token_mask_T"


def carry_token_mask(model: nn.Module) -> dict[MoE, Carrier]:
    """Let the token mask ride each forward as a keyword, from the model's call to its MoE layers.

    Returns:
        The carriers that bring it to each of them, so that a layer grafted on later can be given the same mask.

    An attribute set around the forward would be gone when activation checkpointing repeats the layer during backward,
    and the repeated forward would route the padding. transformers hands unknown keywords to every decoder layer and on
    to its attention, inside the repeated part; there a hook takes the mask off for the MoE layer of that block.
    """
    carriers: dict[MoE, Carrier] = {}
    for module in list(model.modules()):
        attention, layer = getattr(module, "self_attn", None), getattr(module, "mlp", None)
        if not isinstance(attention, nn.Module):
            continue
        carrier = Carrier()
        attention.register_forward_pre_hook(carrier.take, with_kwargs=True)
        if isinstance(layer, MoE):
            carrier.serve(layer)
            carriers[layer] = carrier
    return carriers


class Carrier:
    """Holds one decoder layer's token mask between its attention and its MoE layer."""

    def __init__(self) -> None:
        self.mask_T: Tensor | None = None

    def serve(self, layer: MoE) -> None:
        """Give ``layer`` the mask at each of its forwards."""
        layer.register_forward_pre_hook(self.give, with_kwargs=True)

    def take(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self.mask_T = kwargs.pop(TOKEN_MASK, None)
        return args, kwargs

    def give(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, kwargs | {"token_mask_T": self.mask_T}
