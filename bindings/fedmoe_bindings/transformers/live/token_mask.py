"""How a batch's token mask reaches the MoE layers inside a transformers model."""

from __future__ import annotations

import inspect
from typing import Any, TypeAlias

from torch import Tensor, nn

from fedmoe_core.layer.moe import MoE

Args: TypeAlias = tuple[Any, ...]  # what a module was called with
Options: TypeAlias = dict[str, Any]
# The keyword under which a forward's token mask, bool (T,), travels through the model.
TOKEN_MASK = "fedmoe_token_mask_T"


def carry_token_mask(model: nn.Module, trunk: nn.Module) -> dict[MoE, Carrier]:
    """Let the token mask ride each forward as a keyword, from the model's call to its MoE layers.

    Args:
        model: which is called with the mask.
        trunk: a module inside it that is called with the mask, too, or the model itself.

    Returns:
        The carriers that bring it to each of them, so that a layer grafted on later can be given the same mask.

    An attribute set around the forward would be gone when activation checkpointing repeats the layer during backward,
    and the repeated forward would route the padding. transformers hands unknown keywords to every decoder layer, inside
    the repeated part; there a hook takes the mask off for the MoE layer of that block. Where a family does not, the
    layer takes the mask of the model's last call, which is another one only if a second forward comes between a
    checkpointed forward and its backward.
    """
    carriers: dict[MoE, Carrier] = {}
    places = {name: module for name, module in model.named_modules() if isinstance(module, MoE)}
    above = {name: name.rpartition(".")[0] for name in places}
    last = _Last()
    for called in {model, trunk}:
        called.register_forward_pre_hook(last.see, with_kwargs=True)
    # Layers without a MoE layer are called with the same keywords, so the mask is taken off there, too.
    stacks = {parent.rpartition(".")[0] for parent in above.values()}
    for stack in stacks:
        for layer in model.get_submodule(stack).children():
            layer.register_forward_pre_hook(_drop, with_kwargs=True)
    for name, module in places.items():
        carrier = Carrier(last)
        model.get_submodule(above[name]).register_forward_pre_hook(carrier.take, with_kwargs=True, prepend=True)
        carrier.serve(module)
        carriers[module] = carrier
    return carriers


class _Last:
    """The token mask of a model's last call."""

    def __init__(self) -> None:
        self.mask_T: Tensor | None = None

    def see(self, model: nn.Module, args: Args, kwargs: Options) -> tuple[Args, Options]:
        self.mask_T = kwargs.get(TOKEN_MASK)
        takes = inspect.signature(model.forward).parameters.values()
        if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in takes):
            kwargs = {name: value for name, value in kwargs.items() if name != TOKEN_MASK}
        return args, kwargs


def _drop(_: nn.Module, args: Args, kwargs: Options) -> tuple[Args, Options]:
    """Call a layer without the token mask."""
    return args, {name: value for name, value in kwargs.items() if name != TOKEN_MASK}


class Carrier:
    """Holds one decoder layer's token mask between its call and that of its MoE layer."""

    def __init__(self, last: _Last) -> None:
        self.mask_T: Tensor | None = None
        self._last = last

    def serve(self, layer: nn.Module) -> None:
        """Give ``layer`` the mask at each of its forwards."""
        layer.register_forward_pre_hook(self.give, with_kwargs=True)

    def take(self, _: nn.Module, args: Args, kwargs: Options) -> tuple[Args, Options]:
        self.mask_T = kwargs.pop(TOKEN_MASK, self._last.mask_T)
        return args, kwargs

    def give(self, _: nn.Module, args: Args, kwargs: Options) -> tuple[Args, Options]:
        return args, kwargs | {"token_mask_T": self.mask_T}
