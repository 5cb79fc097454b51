"""The part `model`: a Qwen3-MoE of transformers, forward and backward, its experts by transformers and by fedmoe.

The model has the real widths and few layers, and is made from its configuration with random weights: nothing is
downloaded. Its vocabulary is small, so that the head does not hide the layers. One model serves both contenders, which
change its experts' implementation between their turns, as a user does it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.gpu.measure.launch import Turn, in_turn
from bench.gpu.measure.store import Record, Store

WARM_UP = 3
STOCK = "grouped_mm"  # what transformers takes by itself where it can
# How far the loss, and the gradients of the first layer's experts, may be from transformers' own, relative. In layers
# after it a token may choose another expert where the one before rounded otherwise.
OFF = {torch.bfloat16: 5e-2, torch.float32: 1e-4}


@dataclass(frozen=True)
class Model:
    """What is built: H hidden, `inner` inside an expert, E experts, K choices; attention heads of 128 as Qwen3's."""

    name: str
    H: int
    inner: int
    E: int
    K: int
    layers: int
    heads: tuple[int, int, int]  # of queries, of keys, and their width
    vocabulary: int
    batches: tuple[tuple[int, int], ...]  # sequences and their length

    def config(self) -> Any:
        """Return transformers' configuration of it."""
        from transformers import Qwen3MoeConfig

        queries, keys, width = self.heads
        experts = {"num_experts": self.E, "num_experts_per_tok": self.K, "moe_intermediate_size": self.inner}
        attention = {"num_attention_heads": queries, "num_key_value_heads": keys, "head_dim": width}
        sizes = {"vocab_size": self.vocabulary, "hidden_size": self.H, "num_hidden_layers": self.layers}
        return Qwen3MoeConfig(**sizes, **experts, **attention, norm_topk_prob=True, use_cache=False)


REAL = Model("qwen3-30b-a3b, 2 layers", 2048, 768, 128, 8, 2, (32, 4, 128), 4096, ((4, 2048), (1, 1024)))
TINY = Model("tiny qwen3, 2 layers", 32, 16, 8, 2, 2, (2, 1, 16), 64, ((2, 12),))


def built(model: Model, device: str, dtype: torch.dtype) -> Any:
    """Make the model on its device, with random weights."""
    from transformers import Qwen3MoeForCausalLM

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            torch.manual_seed(0)
            return Qwen3MoeForCausalLM(model.config()).train()
    finally:
        torch.set_default_dtype(before)


def contenders(network: Any) -> dict[str, Callable[[], object]]:
    """Return by name what makes the model run its experts in one way or the other."""
    from fedmoe_bindings.transformers import use_fedmoe

    return {
        "transformers": lambda: network.set_experts_implementation(STOCK),
        "fedmoe": lambda: use_fedmoe(network),
    }


def measure(model: Model, device: str, dtype: torch.dtype, rounds: int, store: Store, until: float) -> bool | None:
    """Time every batch that the store lacks; False = the contenders disagree, None = out of time."""
    left = [batch for batch in model.batches if not store.find("models", model=model.name, batch=list(batch))]
    if not left:
        return True
    network = built(model, device, dtype)
    modes, agree = contenders(network), True
    for batch in left:
        if time.monotonic() > until:
            return None
        draw = torch.Generator(device).manual_seed(1)
        tokens = torch.randint(0, model.vocabulary, batch, device=device, generator=draw)
        loss_off, grads_off = difference(network, modes, tokens)
        named: Record = {"model": model.name, "batch": list(batch), "dtype": str(dtype).removeprefix("torch.")}
        if not max(loss_off, grads_off) < OFF[dtype]:
            agree = False
            reason = f"{model.name}: fedmoe is off by {loss_off:.1e} (loss) and {grads_off:.1e} (gradients)"
            store.add("left_out", [{"peer": "the whole model", "status": "wrong", "reason": reason}])
            continue
        rows = []
        for peer, (ms, host) in _times(network, modes, tokens, device, rounds).items():
            rate = {"ms": ms, "host ms": host, "tokens/s": 1e3 * tokens.numel() / ms, "rounds": rounds}
            off = {"loss differs by": loss_off, "gradients differ by": grads_off}
            rows.append(named | {"peer": peer} | rate | off)
        store.add("models", rows)
    return agree


def step(network: Any, tokens: Tensor) -> Tensor:
    """Run one forward and backward of the language model's loss; the loss."""
    loss = network(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return loss.detach()


def difference(network: Any, modes: dict[str, Callable[[], object]], tokens: Tensor) -> tuple[float, float]:
    """Return how far the two ways are apart, relative: in the loss, and in the first layer's expert gradients."""
    experts = network.model.layers[0].mlp.experts
    found: list[tuple[float, list[Tensor]]] = []
    for mode in modes.values():
        mode()
        network.zero_grad(set_to_none=True)
        loss = step(network, tokens)
        found.append((float(loss), [value.grad for value in (experts.gate_up_proj, experts.down_proj)]))
    network.zero_grad(set_to_none=True)
    (want, grads), (got, others) = found
    apart = [
        float(torch.linalg.vector_norm(b - a, dtype=torch.float32) / torch.linalg.vector_norm(a, dtype=torch.float32))
        for a, b in zip(grads, others, strict=True)
    ]
    return abs(got - want) / abs(want), max(apart)


def _times(
    network: Any, modes: dict[str, Callable[[], object]], tokens: Tensor, device: str, rounds: int
) -> dict[str, tuple[float, float]]:
    """Return the medians of the device's and the host's milliseconds of a step; the contenders run in turn."""

    def turn_of(mode: Callable[[], object]) -> Turn:
        def before(_: int) -> None:
            mode()
            network.zero_grad(set_to_none=True)

        def run(_: int, mark: Callable[[], None]) -> None:
            mark()
            step(network, tokens)
            mark()

        return Turn(before, run)

    turns = {name: turn_of(mode) for name, mode in modes.items()}
    times, host = in_turn(turns, device, (WARM_UP, rounds), {"step": (0, 1)})
    network.zero_grad(set_to_none=True)
    return {name: (statistics.median(ms), statistics.median(host[name, span])) for (name, span), ms in times.items()}
