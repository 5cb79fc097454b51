"""megablocks' layouts to `LayerState` and back, bit for bit; needs no megablocks."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dmoe_truth import relative
from torch import Tensor, nn
from torch.nn.functional import silu

from fedmoe_bindings.megablocks import Arguments, DmoeWeights, dMoE, from_state_dict, load_into, state_of, to_state_dict
from fedmoe_core import MoE
from fedmoe_core.layer.routing_rule import RoutingRule
from fedmoe_core.layer.state import LayerState

E, I, H = 4, 6, 10  # noqa: E741
KINDS = pytest.mark.parametrize("mlp_type", ["glu", "mlp"])


def published(mlp_type: str, **more: tuple[int, ...]) -> dict[str, Tensor]:
    """A state dict as megablocks names and shapes it, no two numbers the same."""
    shapes = {"router.layer.weight": (E, H), "experts.mlp.w1": (E * I, H), "experts.mlp.w2": (E * I, H)}
    shapes |= {"experts.mlp.v1": (E * I, H)} if mlp_type == "glu" else {}
    return {name: torch.randn(shape) for name, shape in (shapes | more).items()}


def dmoe(mlp_type: str = "glu", **setting: Any) -> dMoE:
    options = dict(moe_num_experts=E, moe_top_k=2, mlp_type=mlp_type, fp16=False, return_bias=False) | setting
    return dMoE(Arguments(H, I, **options))


@KINDS
def test_every_row_lies_where_it_belongs(mlp_type: str) -> None:
    tensors = published(mlp_type)
    layer = from_state_dict(tensors, ffn_hidden_size=I).layer
    halves = ["w1", "v1"] if mlp_type == "glu" else ["w1"]
    assert layer.w_in.shape == (E, len(halves) * I, H)
    for e in range(E):
        for half, name in enumerate(halves):
            for i in range(I):
                assert torch.equal(layer.w_in[e, half * I + i], tensors[f"experts.mlp.{name}"][e * I + i])
                assert torch.equal(layer.w_out[e, :, i], tensors["experts.mlp.w2"][e * I + i])
    assert torch.equal(layer.router, tensors["router.layer.weight"])


@KINDS
def test_there_and_back_is_the_same(mlp_type: str) -> None:
    shared = {"shared_expert.up_proj.weight": (I, H), "shared_expert.down_proj.bias": (H,)}
    tensors = published(mlp_type, **{"experts.bias": (H,), **shared})
    prefixed = {f"blocks.3.ffn.{name}": tensor for name, tensor in tensors.items()} | {"blocks.3.norm": torch.ones(1)}
    read = from_state_dict(prefixed, ffn_hidden_size=I, prefix="blocks.3.ffn.")
    assert set(read.shared) == {"up_proj.weight", "down_proj.bias"}
    back = to_state_dict(read)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    assert to_state_dict(read, prefix="x.").keys() == {f"x.{name}" for name in tensors}


@KINDS
def test_a_view_where_a_view_does(mlp_type: str) -> None:
    tensors = published(mlp_type)
    read = from_state_dict(tensors, ffn_hidden_size=I)
    back = to_state_dict(read)

    def shared(one: Tensor, name: str) -> bool:
        return one.untyped_storage().data_ptr() == tensors[name].untyped_storage().data_ptr()

    assert shared(read.layer.w_out, "experts.mlp.w2")
    assert shared(back["experts.mlp.w2"], "experts.mlp.w2")
    assert shared(read.layer.w_in, "experts.mlp.w1") == (mlp_type == "mlp")
    assert shared(back["experts.mlp.w1"], "experts.mlp.w1") == (mlp_type == "mlp")


@KINDS
def test_a_module_there_and_back(mlp_type: str) -> None:
    source = dmoe(mlp_type, bias=True, shared_expert=True)
    nn.init.normal_(source.experts.bias)
    target = dmoe(mlp_type, bias=True, shared_expert=True).double()
    load_into(target, state_of(source))
    want = source.state_dict()
    assert all(torch.equal(tensor.float(), want[name]) for name, tensor in target.state_dict().items())
    assert not state_of(source).layer.router.requires_grad


@KINDS
def test_fedmoes_own_layer_computes_the_same(mlp_type: str) -> None:
    """silu, which both name: the layer of the state equals the module that the state came from."""
    module = dmoe(mlp_type, activation_fn=silu, bias=False, moe_normalize_expert_weights=1).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.7)
    activation = "swiglu" if mlp_type == "glu" else "silu"
    layer = MoE.of(state_of(module).layer, 2, activation=activation, rule=RoutingRule("softmax", renormalize=True))
    x = torch.randn(9, H, dtype=torch.float64)
    assert relative(layer(x), module(x)) < 1e-13
    with torch.no_grad():
        layer.w_in.mul_(1.1), layer.w_out.mul_(0.9)
    load_into(module, layer.global_state())
    assert relative(layer(x), module(x)) < 1e-13


@KINDS
def test_a_part_of_the_experts_is_loaded_among_the_others(mlp_type: str) -> None:
    module, donor = dmoe(mlp_type), dmoe(mlp_type)
    before, new = (({k: v.clone() for k, v in m.state_dict().items()}) for m in (module, donor))
    whole = state_of(donor).layer
    some = replace(whole, experts=(1, 3), w_in=whole.w_in[[1, 3]], w_out=whole.w_out[[1, 3]])
    load_into(module, some)
    for name, tensor in module.state_dict().items():
        if name.startswith("experts.mlp."):
            for e in range(E):
                rows = slice(e * I, (e + 1) * I)
                assert torch.equal(tensor[rows], (new if e in (1, 3) else before)[name][rows]), f"{name} of {e}"
        else:
            assert torch.equal(tensor, (new if name.startswith("router") else before)[name]), name
    with pytest.raises(ValueError, match="holds 2 of 4 experts"):
        to_state_dict(some)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"experts.mlp.w2": None}, "experts.mlp.w2 is missing"),
        ({"experts.mlp.w3": torch.zeros(1)}, "w3 is not a tensor of a dropless layer"),
        ({"experts.mlp.w1": torch.zeros(2 * I, H)}, "gather the ranks' parts first"),
        ({"experts.mlp.v1": torch.zeros(E * I, H + 1)}, "v1 has shape"),
    ],
)
def test_state_dicts_that_do_not_fit_are_refused(change: dict[str, Tensor | None], said: str) -> None:
    tensors = {name: tensor for name, tensor in (published("glu") | change).items() if tensor is not None}
    with pytest.raises(ValueError, match=said):
        from_state_dict(tensors, ffn_hidden_size=I)


def test_a_rank_of_expert_parallelism_does_not_pass_for_a_narrower_layer() -> None:
    """Two ranks' halves: 4 experts of 3 would have as many rows."""
    half = published("glu") | {f"experts.mlp.{name}": torch.zeros(2 * I, H) for name in ("w1", "v1", "w2")}
    with pytest.raises(ValueError, match="4 experts of ffn_hidden_size=6"):
        from_state_dict(half, ffn_hidden_size=I)


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (dict(bias_in=torch.zeros(E, 2 * I), bias_out=torch.zeros(E, H)), "bias_in"),
        (dict(router_bias=torch.zeros(E)), "router_bias"),
        (dict(correction_bias=torch.zeros(E)), "correction_bias"),
        (dict(lora=SimpleNamespace()), "merge them"),
        (dict(w_in=torch.zeros(E, I + 1, H)), "7 rows an expert"),
    ],
)
def test_what_megablocks_has_no_place_for_is_refused(state: dict[str, Any], said: str) -> None:
    layer = replace(from_state_dict(published("glu"), ffn_hidden_size=I).layer, **state)
    for write in (to_state_dict, lambda layer: load_into(dmoe("glu"), layer)):
        with pytest.raises(ValueError, match=said):
            write(layer)


def test_a_load_that_does_not_fit_changes_nothing() -> None:
    module = dmoe("glu", bias=False)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    layer = state_of(dmoe("glu")).layer
    wide = LayerState.whole(layer.router, torch.zeros(E, 2 * I + 2, H), torch.zeros(E, H, I + 1))
    for weights, said in (
        (DmoeWeights(layer, bias_H=torch.zeros(H)), "experts.bias is given"),
        (DmoeWeights(layer, shared={"up_proj.weight": torch.zeros(I, H)}), "up_proj.weight is given"),
        (state_of(dmoe("mlp", bias=False)), "mlp_type 'glu' and the state of 'mlp'"),
        (replace(layer, router=torch.zeros(E + 1, H)), "router.layer.weight is given"),
        (wide, "experts of"),
    ):
        with pytest.raises(ValueError, match=said):
            load_into(module, weights)
        assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    with pytest.raises(ValueError, match="give a dropless layer"):
        state_of(nn.Linear(2, 2))
