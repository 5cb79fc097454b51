"""Layers whose slots serve absent experts, and layers with rows of a client's own."""

import numpy as np
import pytest
import torch
from layer_cases import E, H, I, K, dense, mask, relative

from fedmoe_core.layer.moe import MoE
from fedmoe_core.layer.state import LayerState
from fedmoe_kernels import reference


def served(alias, *held):
    array = np.full(E, -1)
    for absent, by in alias.items():
        array[absent] = by
    return {"permitted": mask(*held), "alias": array}


@pytest.mark.parametrize("trains", [(1, 4), (4,), ()])
def test_a_shared_slot_equals_the_layer_whose_merged_experts_are_copies(trains):
    """Top-k on the original experts; where two choices of a token meet in a slot, its weights add up."""
    weights = [w.requires_grad_() for w in dense(3)]
    layer = MoE(H, I, E, 3, dtype=torch.float64, with_stats=True)
    whole = LayerState.whole(*(w.detach() for w in weights))
    layer.load_global(whole, trainable=mask(*trains), **served({0: 4, 2: 4, 3: 1}, 1, 4))
    x_TH = torch.randn(11, H, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    x, x_true = x_TH.clone().requires_grad_(), x_TH.clone().requires_grad_()
    stands_for = [4, 1, 4, 1, 4]  # expert 5 is absent and nobody's
    router, w_in, w_out = weights
    routing = reference.route(x_true @ router[:5].T, 3)
    y_true = reference.moe_mlp(x_true, routing.slots_TK, routing.weights_TK, w_in[stands_for], w_out[stands_for])
    y = layer(x)
    dy = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(5))
    y.backward(dy)
    y_true.backward(dy)
    assert relative(y, y_true) < 1e-10
    assert relative(x.grad, x_true.grad) < 1e-10
    for name, whole in (("w_in", w_in), ("w_out", w_out), ("router", router)):
        if trains:
            assert relative(getattr(layer, name).grad, whole.grad[list(trains)]) < 1e-10, name
    assert float(layer.last_stats.lost_mass) < float(layer.last_stats.prob_sum_E[5]) + 1e-9


def test_one_expert_per_cluster_is_the_unmerged_layer_bit_for_bit():
    plain, shared = MoE.from_dense(*dense(), K), MoE.from_dense(*dense(), K)
    shared.load_global(LayerState.whole(*dense()), alias=np.arange(E))
    x_TH = torch.randn(9, H, dtype=torch.float64)
    assert torch.equal(plain(x_TH), shared(x_TH))
    shared.set_experts(mask(0, 1))  # the sharing is the plan's and ends with it
    assert shared.slot_map.slot_of_expert.tolist() == [0, 1, -1, -1, -1, -1]


def test_rows_of_a_clients_own_stand_in_for_the_global_ones():
    weights, other = dense(), dense(1)
    own = {"router": {0: other[0][0], 5: other[0][5]}, "w_in": {2: other[1][2]}, "w_out": {2: other[2][2]}}
    layer = MoE(H, I, E, K, dtype=torch.float64)
    layer.load_global(LayerState.whole(*weights), permitted=mask(0, 2, 3), trainable=mask(2), rows=own)
    held = layer.global_state()
    router, w_in, w_out = (w.clone() for w in weights)
    router[0], router[5] = other[0][0], other[0][5]
    w_in[2], w_out[2] = other[1][2], other[2][2]
    assert torch.equal(held.router, router)
    assert torch.equal(held.w_in, w_in[[0, 2, 3]])
    assert torch.equal(held.w_out, w_out[[0, 2, 3]])
    own["w_in"][2].zero_()
    assert torch.equal(layer.global_state().w_in, w_in[[0, 2, 3]]), "the rows were copied"


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"bias": {0: torch.zeros(H)}}, "'bias'"),
        ({"w_in": {1: torch.zeros(2 * I, H)}}, "expert 1, which is not held"),
        ({"router": {E: torch.zeros(H)}}, "expert 6"),
        ({"router": {0: torch.zeros(1)}}, "this layer needs torch.float64"),
        ({"router": {0: torch.zeros(H, dtype=torch.float32)}}, "this layer needs torch.float64"),
    ],
)
def test_rows_that_do_not_fit_are_refused_and_change_nothing(own, said):
    layer = MoE.from_dense(*dense(), K)
    with pytest.raises(ValueError, match=said):
        layer.load_global(LayerState.whole(*dense(1)), permitted=mask(0, 2), rows=own)
    assert layer.experts == tuple(range(E))
    assert torch.equal(layer.global_state().w_in, dense()[1])
