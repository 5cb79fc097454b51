"""How much attention each token receives in the blocks of a transformers model, while that is being recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.modeling_layers import GradientCheckpointingLayer

# How families call the self-attention of a block, and where its maps are in what it returns. Others return more after
# them (the chosen tokens of GLM's sparse attention), or before them (the position bias of T5's descendants).
_MAPS_AT = {"self_attn": 1, "SelfAttention": 2}


@dataclass(frozen=True)
class Attention:
    """The self-attention in the block of a MoE layer.

    Attributes:
        module: which, run eagerly, returns its maps (S, heads, N, N) among other values, unless it is linear.
        at: their place among these.
    """

    module: nn.Module
    at: int

    def watch(self, see: Callable[[Tensor | None], None]) -> RemovableHandle:
        """Hand the maps of every forward to ``see`` until the handle is removed; None where attention makes none."""

        def hook(_: nn.Module, __: object, output: Any) -> None:
            length, maps = output[0].shape[1], output[self.at]
            # Linear attention returns its state there.
            is_map = maps is not None and maps.shape[-2:] == (length, length)
            see(maps if is_map else None)

        return self.module.register_forward_hook(hook)


def attention_beside(model: nn.Module, moe: Sequence[nn.Module]) -> list[Attention | None]:
    """Return the self-attention of each MoE layer's block; None where the block has none, as beside a state space."""
    modules = dict(model.named_modules())
    place_of = {module: name for name, module in modules.items()}
    found: list[Attention | None] = []
    for layer in moe:
        block = place_of[layer]
        while block and not isinstance(modules[block], GradientCheckpointingLayer):  # what transformers' blocks are
            block = block.rpartition(".")[0]
        named = modules[block].named_modules() if block else ()
        inside = [(name.rpartition(".")[2], module) for name, module in named]
        near = [Attention(module, _MAPS_AT[kind]) for kind, module in inside if kind in _MAPS_AT]
        found.append(near[0] if len(near) == 1 else None)
    return found


@contextmanager
def attention_received(model: nn.Module, moe: Sequence[nn.Module]) -> Iterator[list[Tensor | None]]:
    """Yield one entry per MoE layer, (S, N) after every forward in the block: the attention its tokens receive.

    A token's score is the mean over heads, and over the places that see it, of the attention paid to it by the
    attention module of the same block. Attention is computed eagerly meanwhile, for only then are there weights to see.
    An entry stays None where a block has no self-attention.
    """
    found: list[Tensor | None] = [None] * len(moe)
    trunk: Any = next((module for module in model.modules() if hasattr(module, "set_attn_implementation")), None)
    if trunk is None:
        yield found
        return

    def keep(number: int, maps: Tensor | None) -> None:
        found[number] = None if maps is None else _received(maps.detach())

    with ExitStack() as hooks:
        for number, attention in enumerate(attention_beside(model, moe)):
            if attention is not None:
                hooks.callback(attention.watch(partial(keep, number)).remove)
        hooks.enter_context(eager_attention(trunk))
        yield found


@contextmanager
def eager_attention(model: Any) -> Iterator[None]:
    """Within the block compute a transformers model's attention in full, maps and all; then as it was."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _received(weights_SANN: Tensor) -> Tensor:
    """Mean attention to each key, (S, N), over heads and over the queries that do not have it masked."""
    seen_SN = (weights_SANN > 0).any(dim=1).sum(dim=1)
    return weights_SANN.mean(dim=1).sum(dim=1) / seen_SN.clamp(min=1)
