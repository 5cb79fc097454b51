"""How much attention each token receives in the blocks of a transformers model, while that is being recorded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

_SELF_ATTENTION = ("self_attn", "SelfAttention")


def attention_beside(model: nn.Module, moe: Sequence[nn.Module]) -> list[nn.Module | None]:
    """Return the self-attention of each MoE layer's block, None where there is none: the nearest that stands alone."""
    modules = dict(model.named_modules())
    place_of = {module: name for name, module in modules.items()}
    attentions = [name for name in modules if name.rpartition(".")[2] in _SELF_ATTENTION]
    found: list[nn.Module | None] = []
    for layer in moe:
        above, near = place_of[layer], list[str]()
        while above and not near:
            above = above.rpartition(".")[0]
            near = [name for name in attentions if name.startswith(f"{above}." if above else "")]
        found.append(modules[near[0]] if len(near) == 1 else None)
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

    def watch(number: int) -> Any:
        def hook(module: nn.Module, inputs: object, output: Any) -> None:
            found[number] = None if output[-1] is None else _received(output[-1].detach())

        return hook

    with ExitStack() as hooks:
        for number, attention in enumerate(attention_beside(model, moe)):
            if attention is not None:
                hooks.callback(attention.register_forward_hook(watch(number)).remove)
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
