"""`dMoE` against plain loops in float64, every setting and every gradient by name; needs no megablocks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from dmoe_truth import relative, truth
from torch import Tensor, nn
from torch.nn.functional import relu, silu

from fedmoe_bindings.megablocks import (
    Arguments,
    batched_load_balancing_loss,
    batched_router_zloss,
    clear_load_balancing_loss,
    clear_router_zloss,
    dMoE,
    get_load_balancing_loss,
)

SMALL = dict(hidden_size=12, ffn_hidden_size=20, moe_num_experts=5, moe_top_k=2, fp16=False, return_bias=False)
# Each with what it is there for; "glu" has v1, and a wrong half or a wrong activation shows at weights of 0.7.
SETTINGS = {
    "glu, gelu tanh": dict(mlp_type="glu"),
    "mlp, gelu tanh": dict(mlp_type="mlp"),
    "silu, no bias, weights that sum to 1": dict(
        mlp_type="glu", bias=False, activation_fn=silu, moe_normalize_expert_weights=1
    ),
    "2-norm, sparse asked for": dict(mlp_type="mlp", moe_normalize_expert_weights=2.0, mlp_impl="sparse"),
    "an activation of nobody's list": dict(mlp_type="glu", activation_fn=lambda z: torch.sin(z) + z.square()),
    "memory optimized glu": dict(mlp_type="glu", memory_optimized_mlp=True),
    "memory optimized mlp": dict(mlp_type="mlp", memory_optimized_mlp=True, activation_fn=relu),
    "one choice": dict(mlp_type="glu", moe_top_k=1),
    "all experts": dict(mlp_type="mlp", moe_top_k=5),
    "uniform": dict(mlp_type="glu", uniform_expert_assignment=True),
    "shared expert": dict(mlp_type="glu", shared_expert=True, shared_expert_hidden_size=8),
    "shared expert, weighted": dict(mlp_type="mlp", shared_expert=True, shared_expert_weighted_sum=True, bias=False),
}
named = pytest.mark.parametrize("setting", SETTINGS, ids=str)


def layer_of(dtype: torch.dtype = torch.float64, seed: int = 0, **setting: Any) -> dMoE:
    torch.manual_seed(seed)
    layer = dMoE(Arguments(**SMALL | setting)).to(dtype)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.7)
    return layer


def run(layer: dMoE, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Output and every gradient by name."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(dy)
    return {"y": y, "x": x.grad} | {name: p.grad for name, p in layer.named_parameters()}


def run_truth(layer: dMoE, x: Tensor, dy: Tensor, permitted: Tensor | None = None) -> dict[str, Tensor]:
    leaves = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}
    x = x.double().requires_grad_()
    y = truth(layer.router.args, leaves, x, permitted).out
    grads = torch.autograd.grad(y, [x, *leaves.values()], dy.double(), materialize_grads=True)
    return {"y": y} | dict(zip(("x", *leaves), grads, strict=True))


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@named
def test_the_layer_is_what_the_loops_say(setting: str) -> None:
    layer, x, dy = layer_of(**SETTINGS[setting]), drawn(7, 3, 12), drawn(7, 3, 12, seed=2)
    got, want = run(layer, x, dy), run_truth(layer, x, dy)
    assert got.keys() == want.keys()
    for name in want:
        assert relative(got[name], want[name]) < 1e-12, name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_other_dtypes(dtype: torch.dtype, tolerance: float) -> None:
    """All experts are chosen, for a choice that is close would go otherwise in a narrow dtype."""
    layer = layer_of(dtype, mlp_type="glu", moe_top_k=5)
    x, dy = drawn(7, 3, 12).to(dtype), drawn(7, 3, 12, seed=2).to(dtype)
    got, want = run(layer, x, dy), run_truth(layer, x, dy)
    for name in want:
        assert relative(got[name], want[name]) < tolerance, name


@pytest.mark.parametrize("experts", [[1], [0, 3], [0, 2, 4]], ids=str)
def test_inv3_permitted_experts_are_the_sub_model(experts: list[int]) -> None:
    layer, x, dy = layer_of(mlp_type="glu"), drawn(7, 3, 12), drawn(7, 3, 12, seed=2)
    permitted = torch.zeros(5, dtype=torch.bool)
    permitted[experts] = True
    free = layer(x)
    layer.permit(permitted)
    got, want = run(layer, x, dy), run_truth(layer, x, dy, permitted)
    for name in want:
        assert relative(got[name], want[name]) < 1e-12, name
    for name in ("w1", "v1", "w2"):
        assert not got[f"experts.mlp.{name}"].view(5, -1)[~permitted].any(), "a forbidden expert has a gradient"
    assert not torch.equal(got["y"], free)
    assert "router.permitted" not in layer.state_dict()
    layer.permit(None)
    assert torch.equal(layer(x), free)


def test_recomputing_gives_the_same_bits_and_keeps_less() -> None:
    def kept(layer: dMoE) -> int:
        sizes: dict[int, int] = {}

        def pack(value: Tensor) -> Tensor:
            sizes[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
            return value

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            y = layer(drawn(64, 12).requires_grad_())
        assert y.requires_grad, "and so what was saved is alive"
        return sum(sizes.values())

    plain, saving = layer_of(mlp_type="glu"), layer_of(mlp_type="glu", memory_optimized_mlp=True)
    want, got = (run(layer, drawn(64, 12), drawn(64, 12, seed=2)) for layer in (plain, saving))
    assert all(torch.equal(got[name], want[name]) for name in want)
    # The opened gate and the activation of 128 rows of 20 float64.
    assert kept(plain) - kept(saving) == 2 * 128 * 20 * 8


def test_an_activation_with_parameters_trains_either_way() -> None:
    found = []
    for again in (False, True):
        act = nn.PReLU(dtype=torch.float64)
        layer = layer_of(mlp_type="glu", activation_fn=act, memory_optimized_mlp=again)
        run(layer, drawn(9, 12), drawn(9, 12, seed=2))
        found.append(act.weight.grad)
    assert relative(found[1], found[0]) < 1e-14
    assert found[0].any()


def test_return_bias_leaves_the_addition_to_the_caller() -> None:
    both, x = layer_of(mlp_type="mlp", return_bias=True), drawn(4, 12)
    out, bias = both(x)
    assert torch.equal(out + bias, layer_of(mlp_type="mlp")(x))
    assert isinstance(layer_of(mlp_type="mlp", return_bias=True, bias=False)(x), Tensor)


def test_jitter_is_of_the_router_alone_and_in_training_alone() -> None:
    layer, plain, x = layer_of(mlp_type="mlp", moe_jitter_eps=0.5), layer_of(mlp_type="mlp"), drawn(20, 12)
    assert not torch.equal(layer(x), plain(x))
    torch.manual_seed(3)
    logits = layer.router(x)[0]
    torch.manual_seed(3)
    noisy = x * (0.5 + torch.rand(x.shape, dtype=x.dtype))
    assert relative(logits, noisy @ layer.router.layer.weight.T) < 1e-14
    layer.eval()
    assert torch.equal(layer(x), plain.eval()(x))


def test_under_autocast_the_layer_runs_in_its_dtype() -> None:
    setting = dict(mlp_type="glu", moe_top_k=5, memory_optimized_mlp=True, bias=False)
    layer, x = layer_of(torch.float32, **setting), drawn(6, 12).float()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())
    assert relative(y, truth(layer.router.args, dict(layer.double().named_parameters()), x.double()).out) < 3e-2


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("setting", ["glu, gelu tanh", "memory optimized mlp"])
def test_the_layer_compiles_whole(setting: str) -> None:
    layer, x, dy = layer_of(**SETTINGS[setting]), drawn(7, 3, 12), drawn(7, 3, 12, seed=2)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    found = []
    for call in (layer, compiled):
        layer.zero_grad()
        y = call(x)
        y.backward(dy)
        found.append([y, *(p.grad.clone() for p in layer.parameters())])
    assert all(map(torch.equal, *found))


def test_tokens_none_and_one() -> None:
    layer = layer_of(mlp_type="glu", memory_optimized_mlp=True)
    for tokens in (0, 1):
        x = drawn(tokens, 12).requires_grad_()
        layer(x).sum().backward()
        assert x.grad is not None
        assert x.grad.shape == x.shape


class Two(nn.Module):
    """Two layers in turn."""

    def __init__(self, **setting: Any) -> None:
        super().__init__()
        self.first, self.second = layer_of(**setting), layer_of(seed=1, **setting)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_the_load_balancing_loss_by_its_equation() -> None:
    setting = dict(mlp_type="mlp", num_layers=2, moe_loss_weight=0.3)
    args, model, x = Arguments(**SMALL | setting), Two(**setting), drawn(6, 3, 12)
    with torch.no_grad():
        middle = model.first.eval()(x)
    assert get_load_balancing_loss(model) == []
    model.train()(x)
    loss = batched_load_balancing_loss(args, model)
    want: Any = 0.0
    leaves = []
    for layer, seen in ((model.first, x), (model.second, middle)):
        named = dict(layer.named_parameters())
        leaves.append(named["router.layer.weight"])
        told = truth(args, named, seen)
        want = want + (told.counts * told.scores.mean(0)).sum()
    want = 0.3 * 5 / (2 * 18 * 2) * want
    assert relative(loss, want) < 1e-12
    got, wanted = torch.autograd.grad(loss, leaves[1:]), torch.autograd.grad(want, leaves[1:])
    assert relative(got[0], wanted[0]) < 1e-12
    with pytest.raises(ValueError, match="clear_load_balancing_loss"):
        model(x), batched_load_balancing_loss(args, model)
    clear_load_balancing_loss(model)
    assert get_load_balancing_loss(model) == []
    assert batched_load_balancing_loss(Arguments(**SMALL | {"moe_loss_weight": 0}), model) == 0.0


def test_the_z_loss_by_its_equation() -> None:
    setting = dict(mlp_type="mlp", moe_zloss_weight=1e-3, moe_loss_weight=0)
    args, model, x = Arguments(**SMALL | setting), Two(**setting), drawn(6, 3, 12)
    with pytest.raises(ValueError, match="no router has run"):
        batched_router_zloss(args, model)
    model(x)
    loss = batched_router_zloss(args, model)
    assert isinstance(loss, Tensor)
    told = truth(args, dict(model.first.named_parameters()), x)
    assert loss.shape == (2,)
    assert relative(loss[0], 1e-3 * told.logits.exp().sum(1).log().square().mean()) < 1e-12
    assert get_load_balancing_loss(model) == [], "a weight of 0 keeps nothing"
    copied = copy.deepcopy(model)  # what was kept has a graph, which cannot be copied
    with pytest.raises(ValueError, match="no router has run"):
        batched_router_zloss(args, copied)
    clear_router_zloss(model)
    with pytest.warns(UserWarning, match="moe_zloss_weight is 0"):
        assert batched_router_zloss(Arguments(**SMALL), model) == 0


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (dict(moe_expert_model_parallelism=True), "expert parallelism is not served"),
        (dict(expert_parallel_group=object()), "expert parallelism is not served"),
        (dict(moe_capacity_factor=2), "drops tokens"),
        (dict(mlp_type="moe"), "choose one of mlp, glu"),
        (dict(mlp_impl="dense"), "choose one of grouped, sparse"),
        (dict(moe_top_k=6), "choose 1 to moe_num_experts=5"),
        (dict(hidden_size=0), "hidden_size=0"),
        (dict(activation_fn=None), "cannot be called"),
        (dict(shared_expert=True, return_bias=True), "set return_bias=False"),
    ],
)
def test_what_is_not_served_is_refused_by_name(setting: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Arguments(**SMALL | setting)


def test_masks_and_widths_that_do_not_fit_are_refused() -> None:
    layer = layer_of(mlp_type="mlp")
    for mask in (torch.ones(4, dtype=torch.bool), torch.ones(5), torch.zeros(5, dtype=torch.bool)):
        with pytest.raises(ValueError, match="give a bool mask"):
            layer.permit(mask)
    with pytest.raises(ValueError, match="sends tokens to all experts"):
        layer_of(uniform_expert_assignment=True).permit(torch.ones(5, dtype=torch.bool))
    with pytest.raises(ValueError, match="hidden_size=12"):
        layer(torch.zeros(3, 11))


def test_the_published_defaults() -> None:
    args = Arguments()
    assert (args.hidden_size, args.ffn_hidden_size, args.moe_num_experts, args.dtype) == (1024, 4096, 1, torch.float16)
    assert Arguments(bf16=True, fp16=False).dtype == torch.bfloat16
    z = drawn(50)
    assert torch.equal(args.activation_fn(z), torch.nn.functional.gelu(z, approximate="tanh"))
