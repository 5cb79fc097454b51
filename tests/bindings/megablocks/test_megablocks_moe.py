"""`moe_of`: a dropless layer as fedmoe's own, the same numbers, and back; needs no megablocks."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from dmoe_truth import relative
from torch import Tensor, nn
from torch.nn import functional

from fedmoe_bindings.megablocks import Arguments, dMoE, load_into, moe_of, weights_of
from fedmoe_bindings.megablocks.moe import activation_name

TANH = partial(functional.gelu, approximate="tanh")
SETTINGS: dict[str, dict[str, Any]] = {
    "glu, the default activation": dict(mlp_type="glu"),
    "mlp, the default activation": dict(mlp_type="mlp"),
    "silu, no bias, weights that sum to 1": dict(
        mlp_type="glu", bias=False, activation_fn=functional.silu, moe_normalize_expert_weights=1
    ),
    "exact gelu, shared expert": dict(mlp_type="glu", activation_fn=nn.GELU(), shared_expert=True),
    "relu, shared expert without bias": dict(mlp_type="mlp", activation_fn=torch.relu, shared_expert=True, bias=False),
}
named = pytest.mark.parametrize("setting", SETTINGS, ids=str)


def layer_of(**setting: Any) -> dMoE:
    torch.manual_seed(0)
    options = dict(moe_num_experts=5, moe_top_k=2, fp16=False, return_bias=False) | setting
    layer = dMoE(Arguments(12, 20, **options)).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.7)
    return layer


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@named
def test_the_numbers_are_the_same(setting: str) -> None:
    source, x, dy = layer_of(**SETTINGS[setting]), drawn(9, 3, 12), drawn(9, 3, 12, seed=2)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    layer = moe_of(source)
    want, got = source(leaves[0]), layer(leaves[1])
    assert relative(got, want) < 1e-12
    want.backward(dy), got.backward(dy)
    assert relative(leaves[1].grad, leaves[0].grad) < 1e-12
    mlp = source.experts.mlp
    halves = [w.grad.view(5, 20, 12) for w in (mlp.w1, mlp.v1) if w is not None]
    assert relative(layer.w_in.grad, torch.cat(halves, 1)) < 1e-12
    assert relative(layer.w_out.grad, mlp.w2.grad.view(5, 20, 12).transpose(1, 2)) < 1e-12
    assert relative(layer.router.grad, source.router.layer.weight.grad) < 1e-12


@named
def test_permitted_experts_are_the_same_sub_model_and_go_back(setting: str) -> None:
    source, x = layer_of(**SETTINGS[setting]), drawn(9, 12)
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    permitted = torch.tensor([True, False, True, True, False])
    layer = moe_of(source, permitted=permitted, trainable=[True, False, False, False, False])
    assert layer.w_in.shape[0] == 1
    source.permit(permitted)
    assert relative(layer(x), source(x)) < 1e-12
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1)
    load_into(source, weights_of(layer))
    assert relative(layer(x), source(x)) < 1e-12
    for name, tensor in source.state_dict().items():
        if name.startswith("experts.mlp"):
            changed = (tensor != before[name]).view(5, -1).any(1)
            assert changed.tolist() == [True, False, False, False, False], name


@pytest.mark.parametrize(
    ("function", "gated", "plain"),
    [
        (functional.silu, "swiglu", "silu"),
        (nn.SiLU(), "swiglu", "silu"),
        (functional.gelu, "geglu", "gelu"),
        (partial(functional.gelu), "geglu", "gelu"),
        (TANH, "geglu_tanh", "gelu_tanh"),
        (nn.GELU("tanh"), "geglu_tanh", "gelu_tanh"),
        (functional.relu, None, "relu"),
        (nn.ReLU(), None, "relu"),
        (torch.sigmoid, None, None),
        (partial(functional.silu, inplace=True), None, None),
        (lambda z: functional.silu(z), None, None),
    ],
)
def test_functions_have_their_names_or_are_refused(function: Any, gated: str | None, plain: str | None) -> None:
    for mlp_type, want in (("glu", gated), ("mlp", plain)):
        if want is None:
            with pytest.raises(ValueError, match="has no kernel; those of"):
                activation_name(function, mlp_type)
        else:
            assert activation_name(function, mlp_type) == want


@pytest.mark.parametrize(
    "setting",
    [
        dict(moe_jitter_eps=0.1),
        dict(moe_normalize_expert_weights=2),
        dict(uniform_expert_assignment=True),
        dict(shared_expert=True, shared_expert_weighted_sum=True),
    ],
)
def test_what_moe_does_not_do_is_refused_by_name(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{list(setting)[-1]}=.* is not a setting of MoE"):
        moe_of(layer_of(**setting))
