"""Adapters over experts in few bits: the base is codes, the adapters never are, whether their expert trains or not."""

from __future__ import annotations

import pytest
import torch

from fedmoe_core.layer.lora import FACTORS, LayerLora
from fedmoe_core.layer.moe import MoE
from fedmoe_core.layer.state import LayerState
from fedmoe_kernels import reference
from fedmoe_kernels.quantized import Quantized

E, K, H, WIDE, RANK, SCALE = 6, 2, 64, 32, 3, 0.7  # WIDE is I


def mask(*experts: int) -> list[bool]:
    return [e in experts for e in range(E)]


def drawn() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, LayerLora]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"router": (E, H), "w_in": (E, 2 * WIDE, H), "w_out": (E, H, WIDE)}
    shapes |= {"a_in": (E, RANK, H), "b_in": (E, 2 * WIDE, RANK), "a_out": (E, RANK, WIDE), "b_out": (E, H, RANK)}
    made = {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}
    return made["router"], made["w_in"], made["w_out"], LayerLora.of(made, SCALE)


@pytest.mark.parametrize("form", ["int8", "int4", "nf4", "mxfp4"])
@pytest.mark.parametrize(("held", "trains"), [(range(E), range(E)), ((0, 2, 5), (2,)), ((1, 3), ()), (range(E), (4,))])
def test_the_layer_is_decoded_weights_plus_adapters(held, trains, form):
    router, w_in, w_out, lora = drawn()
    layer = MoE(H, WIDE, E, K, frozen_format=form)
    layer.load_global(LayerState.whole(router, w_in, w_out, lora=lora), permitted=mask(*held), trainable=mask(*trains))
    ids = sorted(held)
    factors = {name: factor.clone().requires_grad_() for name, factor in lora.factors.items()}
    base_in, base_out = (Quantized.of(w, form).dequantize(torch.float32) for w in (w_in, w_out))
    true_in = base_in + SCALE * factors["b_in"] @ factors["a_in"]
    true_out = base_out + SCALE * factors["b_out"] @ factors["a_out"]
    x = torch.randn(9, H, generator=torch.Generator().manual_seed(4)).requires_grad_()
    x_true = x.detach().clone().requires_grad_()
    routing = reference.route(x_true @ router[ids].T, min(K, len(ids)))
    y_true = reference.moe_mlp(x_true, routing.slots_TK, routing.weights_TK, true_in[ids], true_out[ids])
    y = layer(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    y.backward(dy)
    y_true.backward(dy)
    assert (y - y_true).norm() / y_true.norm() < 1e-5
    assert (x.grad - x_true.grad).norm() / x_true.grad.norm() < 1e-5
    learners = sorted(trains)
    for name in FACTORS if learners else ():
        got, want = getattr(layer, name).grad, factors[name].grad[learners]
        assert (got - want).norm() / want.norm() < 1e-5, name
    learning = {name for name, p in layer.named_parameters() if p.requires_grad and p.numel()}
    assert learning == ({"router", *FACTORS} if learners else set())
    assert layer.w_in_frozen.dtype in (torch.uint8, torch.int8)


def test_adapters_of_frozen_experts_come_back_as_they_went_in():
    """Merged and rounded to 4 bits they would vanish: a change below half a step leaves every code as it is."""
    router, w_in, w_out, lora = drawn()
    layer = MoE(H, WIDE, E, K, frozen_format="int4")
    layer.load_global(LayerState.whole(router, w_in, w_out, lora=lora), trainable=mask(1, 4))
    again = layer.global_state().lora
    for name in FACTORS:
        assert torch.equal(getattr(again, name), getattr(lora, name)), name
    small = LayerLora(lora.a_in, lora.b_in * 1e-3, lora.a_out, lora.b_out * 1e-3, SCALE)
    x = torch.randn(7, H)
    answers = []
    for each in (small, LayerLora(small.a_in, 0 * small.b_in, small.a_out, 0 * small.b_out, SCALE)):
        layer.load_global(LayerState.whole(router, w_in, w_out, lora=each), trainable=mask())
        answers.append(layer(x))
    assert not torch.equal(*answers)


def test_a_layer_that_leaves_few_bits_or_adapters_keeps_nothing_of_them():
    router, w_in, w_out, lora = drawn()
    layer = MoE(H, WIDE, E, K, frozen_format="int4")
    layer.load_global(LayerState.whole(router, w_in, w_out, lora=lora), trainable=mask(1))
    assert layer.a_in_frozen is not None
    layer.load_global(LayerState.whole(router, w_in, w_out), trainable=mask(1))
    assert layer.a_in_frozen is None
    layer.frozen_format = None
    layer.load_global(LayerState.whole(router, w_in, w_out, lora=lora), trainable=mask(1))
    assert layer.a_in_frozen is None
    want = w_in[2] + lora.change("w_in", 2)
    assert torch.equal(layer.w_in_frozen[2], want)  # merged, as ever: slot 0 trains, 1 and 2 are experts 0 and 2


@pytest.mark.parametrize("trains", [(2,), ()])
def test_parameters_cast_alone_run_beside_the_buffers_of_frozen_adapters(trains):
    """FSDP casts parameters and no buffers."""
    router, w_in, w_out, lora = drawn()
    layer = MoE(H, WIDE, E, K, frozen_format="nf4")
    layer.load_global(LayerState.whole(router, w_in, w_out, lora=lora), trainable=mask(*trains))
    x = torch.randn(9, H, generator=torch.Generator().manual_seed(4))
    want = layer(x)
    for parameter in layer.parameters():
        parameter.data = parameter.data.bfloat16()
    found = layer(x.bfloat16())
    assert found.dtype == torch.bfloat16
    # Of a token: one whose choice of experts is a tie in 16 bits may go elsewhere.
    assert ((found.float() - want).norm(dim=1) / want.norm(dim=1)).median() < 0.02


def test_reset_parameters_lets_no_adapter_of_a_frozen_expert_be():
    router, w_in, w_out, lora = drawn()
    layer = MoE(H, WIDE, E, K, frozen_format="nf4")
    layer.load_global(LayerState.whole(router, w_in, w_out, lora=lora), trainable=mask(2))
    layer.reset_parameters()
    assert not layer.b_in_frozen.any()
    assert layer.a_in_frozen.abs().max() <= H**-0.5
