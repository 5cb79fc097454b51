"""Layers whose experts carry adapters: equal to the merged layer, by every gradient, at any rank."""

import numpy as np
import pytest
import torch
from layer_cases import E, H, I, K, dense, mask, relative

from fedmoe_core.layer.lora import FACTORS, LayerLora, first_ranks
from fedmoe_core.layer.moe import MoE
from fedmoe_core.layer.state import LayerState
from fedmoe_kernels import reference

R, SCALE = 3, 0.7


def adapters(seed=0, rank=R):
    """O(1) factors, b included."""
    _, w_in, w_out = dense()
    fresh = LayerLora.fresh(w_in, w_out, rank=rank, scale=SCALE, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    return LayerLora.of(
        {name: torch.randn(f.shape, generator=generator, dtype=f.dtype) for name, f in fresh.factors.items()}, SCALE
    )


def merged(lora, w_in, w_out):
    return w_in + lora.scale * lora.b_in @ lora.a_in, w_out + lora.scale * lora.b_out @ lora.a_out


@pytest.mark.parametrize(("held", "trains"), [(range(E), range(E)), ((0, 2, 5), (2, 5)), ((1, 3), (3,)), ((4,), ())])
def test_a_layer_with_adapters_is_the_merged_layer_and_only_they_train(held, trains):
    weights, lora = dense(), adapters()
    factors = {name: factor.clone().requires_grad_() for name, factor in lora.factors.items()}
    layer = MoE(H, I, E, K, dtype=torch.float64)
    layer.load_global(LayerState.whole(*weights, lora=lora), permitted=mask(*held), trainable=mask(*trains))
    x_TH = torch.randn(9, H, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    x, x_true = x_TH.clone().requires_grad_(), x_TH.clone().requires_grad_()
    ids = sorted(held)
    router = weights[0][ids].clone().requires_grad_()
    w_in, w_out = merged(LayerLora.of(factors, SCALE), *weights[1:])
    routing = reference.route(x_true @ router.T, min(K, len(ids)))
    y_true = reference.moe_mlp(x_true, routing.slots_TK, routing.weights_TK, w_in[ids], w_out[ids])
    y = layer(x)
    dy = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(5))
    y.backward(dy)
    y_true.backward(dy)
    assert relative(y, y_true) < 1e-10
    assert relative(x.grad, x_true.grad) < 1e-10
    trains = sorted(trains)
    for name in FACTORS if trains else ():
        assert relative(getattr(layer, name).grad, factors[name].grad[trains]) < 1e-10, name
    if trains:
        assert relative(layer.router.grad, router.grad[[ids.index(e) for e in trains]]) < 1e-10
    assert layer.w_in.numel() == layer.w_out.numel() == 0
    learning = {name for name, p in layer.named_parameters() if p.requires_grad and p.numel()}
    assert learning == ({"router", *FACTORS} if trains else set())


def test_fresh_adapters_change_nothing_and_are_the_same_for_a_seed():
    weights = dense()
    lora = LayerLora.fresh(*weights[1:], rank=R, scale=SCALE, seed=1)
    plain, adapted = MoE.from_dense(*weights, K), MoE.from_dense(*weights, K)
    adapted.load_global(LayerState.whole(*weights, lora=lora))
    x_TH = torch.randn(9, H, dtype=torch.float64)
    assert torch.equal(plain(x_TH), adapted(x_TH))
    again = LayerLora.fresh(*weights[1:], rank=R, scale=SCALE, seed=1)
    assert all(torch.equal(again.factors[name], factor) for name, factor in lora.factors.items())
    assert float(lora.a_in.abs().max()) <= H**-0.5
    assert not lora.b_in.any()


def test_truncation_keeps_the_first_ranks_of_a_factor_pair():
    lora = adapters()
    cut = lora.truncated(2)
    assert cut.rank == 2
    want = SCALE * sum(torch.outer(lora.b_in[1, :, r], lora.a_in[1, r]) for r in range(2))
    assert relative(cut.change("w_in", 1), want) < 1e-12
    assert first_ranks("b_out", lora.b_out, 2).shape == (E, H, 2)
    for rank in (0, R + 1):
        with pytest.raises(ValueError, match=f"rank {rank} is outside 1..{R}"):
            lora.truncated(rank)


def test_adapters_read_back_while_all_train_and_not_once_merged():
    weights, lora = dense(), adapters()
    layer = MoE(H, I, E, K, dtype=torch.float64)
    layer.load_global(LayerState.whole(*weights, lora=lora), permitted=mask(0, 3, 4))
    state = layer.global_state()
    assert state.experts == (0, 3, 4)
    assert torch.equal(state.w_in, weights[1][[0, 3, 4]])
    for name, factor in lora.factors.items():
        assert torch.equal(getattr(state.lora, name), factor[[0, 3, 4]])
    assert set(layer.trained_state()) == {"router", *FACTORS}
    with pytest.raises(ValueError, match="load_global"):
        layer.set_experts(mask(0))
    layer.load_global(LayerState.whole(*weights, lora=lora), permitted=mask(0, 3), trainable=mask(3))
    with pytest.raises(ValueError, match="merged"):
        layer.global_state()
    layer.load_global(LayerState.whole(*weights))  # and without adapters it is a plain layer again
    assert layer.global_state().lora is None
    assert layer.w_in.shape[0] == E


def test_a_clients_own_factors_stand_in_for_the_global_ones():
    weights, lora, other = dense(), adapters(), adapters(seed=7)
    layer = MoE(H, I, E, K, dtype=torch.float64)
    rows = {"a_in": {2: other.a_in[2]}, "b_in": {5: other.b_in[5]}}
    layer.load_global(LayerState.whole(*weights, lora=lora), permitted=mask(2, 5), trainable=mask(2), rows=rows)
    assert torch.equal(layer.a_in[0], other.a_in[2])
    want = weights[1][5] + SCALE * other.b_in[5] @ lora.a_in[5]
    assert relative(layer.w_in_frozen[1], want) < 1e-12
    assert torch.equal(lora.b_in, adapters().b_in), "the rows given changed the global factors"


def test_adapters_over_frozen_experts_in_few_bits():
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(s, generator=generator, dtype=torch.float64) for s in ((E, 64), (E, 64, 64), (E, 64, 32))]
    lora = LayerLora.fresh(*weights[1:], rank=2, scale=1.0, seed=0)
    layer = MoE(64, 32, E, K, frozen_format="int8", dtype=torch.float64)
    layer.load_global(LayerState.whole(*weights, lora=lora))
    x_TH = torch.randn(9, 64, dtype=torch.float64)
    exact = MoE.from_dense(*weights, K)(x_TH)
    assert relative(layer(x_TH), exact) < 2e-2
    layer(x_TH).sum().backward()
    assert layer.b_in.grad.norm() > 0


def test_an_output_scale_multiplies_the_layer_and_learns():
    layer = MoE.from_dense(*dense(), K)
    x_TH = torch.randn(9, H, dtype=torch.float64)
    plain = layer(x_TH)
    layer.out_scale = torch.nn.Parameter(torch.tensor(1.7, dtype=torch.float64))
    scaled = layer(x_TH)
    assert relative(scaled, 1.7 * plain) < 1e-12
    dy = torch.randn(plain.shape, dtype=plain.dtype)
    scaled.backward(dy)
    assert layer.out_scale.grad.item() == pytest.approx(float((dy * plain.detach()).sum()), rel=1e-9)
    assert np.isfinite(layer.out_scale.grad.item())
