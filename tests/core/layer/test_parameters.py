"""The Parameters of a layer: each has a row, and an optimizer goes on with them where the trained experts stay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from layer_cases import E, H, K, dense, mask
from torch import nn

from fedmoe_core.layer.lora import LayerLora
from fedmoe_core.layer.moe import MoE
from fedmoe_core.layer.state import LayerState

X = torch.randn(16, H, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def whole(seed: int = 0, lora: bool = False) -> LayerState:
    weights = dense(seed)
    biases = {name: torch.randn(E, n, dtype=torch.float64) for name, n in (("bias_in", 40), ("bias_out", 12))}
    state = LayerState.whole(*weights, router_bias=torch.zeros(E, dtype=torch.float64), **biases)
    return replace(state, lora=LayerLora.fresh(*weights[1:], rank=3, scale=2.0, seed=0)) if lora else state


KINDS: dict[str, Callable[[], MoE]] = {
    "all train": lambda: MoE.of(whole(), K),
    "some train": lambda: MoE.of(whole(), K, permitted=mask(0, 2, 3), trainable=mask(2)),
    "none trains": lambda: MoE.of(whole(), K, trainable=mask()),
    "frozen router": lambda: MoE.of(whole(), K, train_router=False),
    "adapters": lambda: MoE.of(whole(lora=True), K, trainable=mask(1, 2)),
    "adapters, none trains": lambda: MoE.of(whole(lora=True), K, trainable=mask()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_inv5_a_parameter_has_rows_and_a_gradient(kind: str) -> None:
    """Those without were refused by DDP, FSDP2, the infinity norm and the resume of a distributed checkpoint."""
    layer = KINDS[kind]()
    layer(X.clone().requires_grad_()).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.requires_grad, name
        assert parameter.numel() > 0, name
        assert parameter.grad is not None, name
    if "none trains" in kind:
        assert not list(layer.parameters())
        torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0, norm_type=float("inf"))
    else:
        norm = torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0, norm_type=float("inf"))
        assert 0 < norm < float("inf")


def test_an_empty_name_is_a_tensor_still() -> None:
    layer = KINDS["none trains"]()
    assert (layer.w_in.shape, layer.router.shape) == ((0, 40, 12), (0, 12))
    assert "w_in" in layer.state_dict()
    layer.set_experts(None, mask(1))
    assert isinstance(layer.w_in, nn.Parameter)
    assert [name for name, _ in layer.named_parameters()] == [
        name for name, _ in MoE.of(whole(), K, trainable=mask(1)).named_parameters()
    ]
    layer.set_experts(None, mask())
    assert not list(layer.parameters())
    assert torch.equal(layer.global_state().w_in, dense()[1])


@pytest.mark.parametrize("kind", ["all train", "some train", "frozen router"])
def test_set_experts_with_the_same_trained_experts_leaves_the_optimizer_its_parameters(kind: str) -> None:
    """They were new objects even for unchanged masks: the optimizer went on, and nothing moved."""
    layer = KINDS[kind]()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    layer(X).square().sum().backward()
    held = {name: (p, p.grad, p.detach().clone()) for name, p in layer.named_parameters()}
    trains = np_mask(layer.trainable_experts)
    layer.set_experts(trains | np_mask(layer.experts[:-1]), trains)  # another frozen set where there is one
    for name, parameter in layer.named_parameters():
        old, gradient, values = held.pop(name)
        assert parameter is old, name
        assert parameter.grad is gradient, name
        assert torch.equal(parameter, values), name
    assert not held
    before = layer.w_in.detach().clone()
    optimizer.step()
    assert not torch.equal(layer.w_in, before)


def np_mask(ids: tuple[int, ...]):
    return mask(*ids)


@pytest.mark.parametrize("kind", ["all train", "some train", "adapters"])
def test_load_global_of_the_same_experts_writes_into_the_parameters(kind: str) -> None:
    layer, lora = KINDS[kind](), kind == "adapters"
    layer(X).square().sum().backward()
    held = dict(layer.named_parameters())
    source = whole(1, lora)
    layer.load_global(source, permitted=np_mask(layer.experts), trainable=np_mask(layer.trainable_experts))
    assert all(p is held[name] and p.grad is None for name, p in layer.named_parameters())
    fresh = MoE.of(source, K, permitted=np_mask(layer.experts), trainable=np_mask(layer.trainable_experts))
    assert all(torch.equal(a, b) for a, b in zip(layer.state_dict().values(), fresh.state_dict().values(), strict=True))
    assert torch.equal(layer(X), fresh(X))


def test_other_trained_experts_are_new_parameters() -> None:
    layer = KINDS["some train"]()
    before = layer.w_in
    layer.set_experts(mask(0, 2, 3), mask(3))
    assert layer.w_in is not before
    assert torch.equal(layer.w_in[0], dense()[1][3])


def test_a_state_of_another_dtype_is_stored_as_it_is() -> None:
    layer = MoE.from_dense(*dense(), K)
    layer.load_global(LayerState.whole(*(w.float() for w in dense())))
    assert layer.w_in.dtype == layer.router.dtype == torch.float32
