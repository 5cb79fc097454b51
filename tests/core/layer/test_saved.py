"""State dicts of a layer: what they say of it, and that one that does not fit leaves the layer as it was."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from layer_cases import H, K, dense, mask
from torch import nn

from fedmoe_core.layer.lora import LayerLora
from fedmoe_core.layer.moe import MoE
from fedmoe_core.layer.routing_rule import RoutingRule
from fedmoe_core.layer.state import LayerState


def adapted(scale: float, seed: int = 0) -> MoE:
    """A layer with adapters that change something."""
    weights = dense()
    lora = LayerLora.fresh(*weights[1:], rank=3, scale=scale, seed=seed)
    return MoE.of(replace(LayerState.whole(*weights), lora=replace(lora, b_in=torch.ones_like(lora.b_in))), K)


def bits(layer: nn.Module) -> dict[str, Any]:
    return {name: value.clone() for name, value in layer.state_dict().items()}


def assert_same(layer: nn.Module, before: dict[str, Any]) -> None:
    after = layer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_the_scale_of_adapters_is_in_the_state_dict() -> None:
    """It was in none: "All keys matched", and outputs 89 % apart."""
    trained, fresh = adapted(2.0), adapted(1.0, seed=1)
    fresh.load_state_dict(trained.state_dict())
    assert fresh.lora_scale == 2.0
    x = torch.randn(5, H, dtype=torch.float64)
    assert torch.equal(fresh(x), trained(x))


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (lambda: MoE.from_dense(*dense(1), K, permitted=mask(2, 3)), r"holds experts \[2, 3\], this layer \[0, 1\]"),
        (
            lambda: MoE.from_dense(*dense(1), K, permitted=mask(0, 1), trainable=mask(0)),
            "of which 1 train, not 2; call set_experts",
        ),
        (lambda: MoE.from_dense(*dense(1), 1, permitted=mask(0, 1)), "top_k=1, this one has 2; make this layer with"),
        (
            lambda: MoE.from_dense(*dense(1), K, permitted=mask(0, 1), rule=RoutingRule(renormalize=False)),
            "a layer with rule=.*False.*this one has .*True",
        ),
        (
            lambda: MoE.from_dense(*dense(1), K, permitted=mask(0, 1), activation="geglu"),
            "activation='geglu', this one has 'swiglu'",
        ),
    ],
)
def test_a_refused_state_dict_changes_nothing_here_and_all_elsewhere(other: Any, said: str) -> None:
    """The layer had the other's weights when it refused them, and modules after it were left out."""
    layer = MoE.from_dense(*dense(), K, permitted=mask(0, 1))
    model, source = nn.Sequential(nn.Linear(2, 2), layer, nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2), other())
    source.append(nn.Linear(2, 2))
    before = bits(layer)
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=said):
            model.load_state_dict(source.state_dict(), strict=strict)
        assert_same(layer, before)
    assert torch.equal(model[2].weight, source[2].weight)


def test_adapters_go_only_to_a_layer_with_adapters() -> None:
    plain, with_them = MoE.from_dense(*dense(), K), adapted(2.0)
    for layer, other in ((plain, with_them), (with_them, plain)):
        before = bits(layer)
        with pytest.raises(RuntimeError, match=r"has adapters and .* has none"):
            layer.load_state_dict(other.state_dict(), strict=False)
        assert_same(layer, before)
    assert plain.lora_scale is None


def test_floats_are_not_read_into_codes() -> None:
    """With strict=False they became experts of zeros."""
    options = dict(permitted=[True] * 2 + [False] * 2, trainable=[True] + [False] * 3)
    coded, plain = (MoE(64, 32, 4, 2, frozen_format=form, **options) for form in ("int8", None))
    before = bits(coded)
    with pytest.raises(RuntimeError, match="frozen_format=None, this one has 'int8'"):
        coded.load_state_dict(plain.state_dict(), strict=False)
    assert_same(coded, before)
    unsaid = {name: value for name, value in plain.state_dict().items() if name != "_extra_state"}
    with pytest.raises(RuntimeError, match=r"w_in_frozen of .* is torch.float32 .* this layer's torch.int8"):
        coded.load_state_dict(unsaid, strict=False)
    assert_same(coded, before)


def test_one_misshapen_tensor_keeps_all_out() -> None:
    layer, other = MoE.from_dense(*dense(), K), MoE.from_dense(*dense(1), K)
    state, before = other.state_dict(), bits(layer)
    state["w_out"] = state["w_out"][1:]
    with pytest.raises(RuntimeError, match=r"w_out of the state dict is .* \(5, 12, 20\), this layer's"):
        layer.load_state_dict(state, strict=False)
    assert_same(layer, before)
    del state["w_out"]
    layer.load_state_dict(state, strict=False)  # the rest, as torch means it
    assert torch.equal(layer.w_in, other.w_in)


def test_a_state_dict_of_an_earlier_version_is_read_and_checked() -> None:
    """It said the experts alone, as a list of integers, and its Parameters could have no rows."""
    old = MoE.from_dense(*dense(1), K, permitted=mask(1, 4), trainable=mask()).state_dict()
    old["_extra_state"] = torch.tensor([0, 1, 4])
    layer = MoE.from_dense(*dense(), K, permitted=mask(1, 4), trainable=mask())
    layer.load_state_dict(old)
    assert torch.equal(layer.w_in_frozen, dense(1)[1][[1, 4]])
    old["_extra_state"] = torch.tensor([0, 1, 5])
    with pytest.raises(RuntimeError, match=r"holds experts \[1, 5\], this layer \[1, 4\]"):
        layer.load_state_dict(old)
    for strange in (torch.zeros(3), torch.zeros(4, dtype=torch.uint8), b"pickled"):
        with pytest.raises(RuntimeError, match=r"its _extra_state is .* was not written by a MoE layer"):
            layer.load_state_dict(old | {"_extra_state": strange})


def test_the_state_dict_has_one_size_whatever_the_scale() -> None:
    """A loader that reads into the tensors that are there needs it."""
    sizes = {adapted(scale).state_dict()["_extra_state"].shape for scale in (2.0, 1 / 3)}
    assert len(sizes) == 1
