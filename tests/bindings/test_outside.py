"""Families whose experts do not use transformers' experts interface, in what the family suite does not ask."""

from __future__ import annotations

import copy

import pytest
import torch
from stock_models import relative
from tiny_families import EXPERTS, inputs_of, tiny_model
from torch.nn.functional import one_hot
from transformers import NllbMoeConfig, SwitchTransformersConfig
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeExperts, NllbMoeSparseMLP
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

from fedmoe_bindings.transformers import use_fedmoe
from fedmoe_bindings.transformers.stock.blocks import stock_blocks
from fedmoe_bindings.transformers.stock.outside import SwitchExperts


def switch(**options: object) -> SwitchTransformersSparseMLP:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_ff": 24, "num_experts": 4, "router_jitter_noise": 0.0}
    block = SwitchTransformersSparseMLP(SwitchTransformersConfig(**sizes | options))
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.3)
    return block


def test_tokens_past_an_experts_capacity_are_dropped_as_in_stock() -> None:
    block = switch(expert_capacity=2).eval()
    x = torch.randn(2, 9, 16)
    want = block(x)
    assert (want == 0).all(dim=-1).any(), "no token was dropped"
    block.experts.forward = SwitchExperts(block.experts)
    assert relative(block(x), want) < 1e-5


def test_dropout_inside_the_experts_is_kept() -> None:
    block = switch(dropout_rate=0.5).train()
    x = torch.randn(2, 40, 16)
    block.experts.forward = SwitchExperts(block.experts)
    torch.manual_seed(1)
    draws = torch.stack([block(x) for _ in range(400)]).detach()
    assert draws.std(dim=0).mean() > 0.1 * draws.mean(dim=0).abs().mean()
    block.eval()
    # Dropout keeps the mean; the second product is linear.
    assert relative(draws.mean(dim=0), block(x)) < 0.1


@pytest.mark.parametrize("family", ["dbrx", "jetmoe", "llama4", "switch_transformers"])
def test_a_module_that_was_misread_says_so(family: str) -> None:
    model = use_fedmoe(tiny_model(family))
    block = stock_blocks(model)[0]
    for module in block.experts.modules():
        object.__setattr__(module, "_fedmoe_activation", ("gelu" if family == "switch_transformers" else "geglu",))
    with pytest.raises(RuntimeError, match="differs from its own forward"):
        model(**inputs_of(family))


def test_a_mask_is_lifted_again() -> None:
    model, inputs = tiny_model("switch_transformers"), inputs_of("switch_transformers")
    want = use_fedmoe(model)(**inputs).logits
    use_fedmoe(model, permitted=torch.arange(EXPERTS) < 3)
    assert not torch.equal(model(**inputs).logits, want)
    assert torch.equal(use_fedmoe(model)(**inputs).logits, want)
    assert torch.equal(copy.deepcopy(model)(**inputs).logits, want)


def test_why_nllb_is_refused() -> None:
    """transformers' own experts take the mask of the first choice for a list of experts: they run numbers 0 and 1."""
    torch.manual_seed(0)
    config = NllbMoeConfig(d_model=8, num_experts=4, encoder_ffn_dim=12, moe_token_dropout=0.0)
    experts = NllbMoeExperts(config, 12).eval()
    x, chosen = torch.randn(5, 8), torch.tensor([2, 3, 2, 3, 2])
    found = experts(x, one_hot(chosen, 4), one_hot(chosen, 4).float())
    assert relative(found, experts["expert_1"](x)) < 1e-6, "it is right now: serve it"

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config, self.ffn = config, NllbMoeSparseMLP(config, 12)

    with pytest.raises(ValueError, match="runs its experts 0 and 1 only, whichever the router chose"):
        stock_blocks(Model())
