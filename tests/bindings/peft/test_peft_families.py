"""LoRA on the experts of other families: fused where ``moe_mlp`` computes them, on peft's own forward where not."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from drawn_adapters import randomised
from peft import LoraConfig, get_peft_model
from tiny_families import inputs_of, tiny_model
from torch import Tensor, nn

from fedmoe_bindings.peft import fuse
from fedmoe_bindings.peft.fuse import fuse_lora
from fedmoe_bindings.peft.stacks import matrices_of
from fedmoe_kernels.backends import warn_once


def gradients(model: nn.Module, family: str) -> tuple[Tensor, dict[str, Tensor]]:
    logits = model(**inputs_of(family))[0]
    logits.backward(torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits.dtype))
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("family", "fused"),
    [
        ("gpt_oss", True),  # transposed, in turn, biases
        ("openai_privacy_filter", True),  # transposed, biases
        ("aria", True),  # transposed
        ("deepseek_v2", True),  # shared experts
        ("deepseek_v3", True),
        ("minimax_m3_vl", True),
        ("nemotron_h", True),  # no gate, relu2
        ("deepseek_v4", True),  # clamps
        ("inkling2", False),  # a gate of its own
        ("gemma4", True),
    ],
)
def test_loss_and_gradients_are_pefts(family: str, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # In float64, though parts of many families compute in float32 there; inkling2 runs in 32 bits alone.
    dtype, close = (torch.float64, 1e-5) if fused else (torch.float32, 1e-4)
    stock = tiny_model(family, dtype=dtype)
    stock.set_experts_implementation("eager")
    targets = [f"experts.{name}" for name in next(matrices_of(m) for m in stock.modules() if matrices_of(m))]
    peft = get_peft_model(stock, LoraConfig(r=3, lora_alpha=4, target_modules=[], target_parameters=targets)).eval()
    randomised(peft, seed=1)
    ours = copy.deepcopy(peft)
    taken: list[fuse.Offer] = []
    asked = fuse.Offer.__call__
    monkeypatch.setattr(fuse.Offer, "__call__", lambda offer: (taken.append(offer), asked(offer))[1])
    warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        logits, got = gradients(fuse_lora(ours), family)
    want_logits, want = gradients(peft, family)
    assert (logits - want_logits).norm() / want_logits.norm() < close
    for name, grad in want.items():
        assert (got[name] - grad).norm() / grad.norm() < close, name
    assert bool(taken) == fused
    assert any("runs on peft's own forward" in str(each.message) for each in said) != fused
