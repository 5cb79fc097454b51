"""How much attention each token receives in the blocks of a transformers model, while that is being recorded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def attention_received(model: nn.Module, moe: Sequence[nn.Module]) -> Iterator[list[Tensor | None]]:
    """Yield one entry per MoE layer, (S, N) after every forward in the block: the attention its tokens receive.

    A token's score is the mean over heads, and over the places that see it, of the attention paid to it by the
    attention module of the same block. Attention is computed eagerly meanwhile, for only then are there weights to see.
    An entry stays None where a block has no module called ``self_attn``.
    """
    found: list[Tensor | None] = [None] * len(moe)
    modules = dict(model.named_modules())
    place_of = {module: name.rpartition(".")[0] for name, module in modules.items()}
    trunk: Any = next((module for module in modules.values() if hasattr(module, "set_attn_implementation")), None)
    if trunk is None:
        yield found
        return
    usual = trunk.config._attn_implementation

    def watch(number: int) -> Any:
        def hook(module: nn.Module, inputs: object, output: Any) -> None:
            found[number] = None if output[1] is None else _received(output[1].detach())

        return hook

    with ExitStack() as hooks:
        for number, layer in enumerate(moe):
            attention = modules.get(f"{place_of[layer]}.self_attn")
            if attention is not None:
                hooks.callback(attention.register_forward_hook(watch(number)).remove)
        trunk.set_attn_implementation("eager")
        try:
            yield found
        finally:
            trunk.set_attn_implementation(usual)


def _received(weights_SANN: Tensor) -> Tensor:
    """Mean attention to each key, (S, N), over heads and over the queries that do not have it masked."""
    seen_SN = (weights_SANN > 0).any(dim=1).sum(dim=1)
    return weights_SANN.mean(dim=1).sum(dim=1) / seen_SN.clamp(min=1)
