"""MoE: compact storage, equality to the dense sub-model, frozen bits, changes between rounds, statistics."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_cases import E, H, I, K, dense, mask, relative, truth
from torch.utils.checkpoint import checkpoint
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from fedmoe_core.layer.moe import MoE
from fedmoe_core.layer.recording import recording
from fedmoe_core.layer.router_loss import balance_loss
from fedmoe_core.layer.routing_rule import RoutingRule
from fedmoe_core.layer.state import LayerState
from fedmoe_kernels.formats import FORMATS


@settings(max_examples=25, deadline=None)
@given(
    ids=st.sets(st.integers(0, E - 1), min_size=1),
    frozen=st.sets(st.integers(0, E - 1)),
    k=st.integers(1, 3),
    renormalize=st.booleans(),
    seed=st.integers(0, 99),
)
def test_inv3_layer_equals_the_dense_submodel(ids, frozen, k, renormalize, seed):
    weights = [w.requires_grad_() for w in dense(seed)]
    trains = sorted(ids - frozen)
    rule = RoutingRule(renormalize=renormalize)
    layer = MoE.from_dense(*weights, k, permitted=mask(*ids), trainable=mask(*trains), rule=rule)
    x_TH = torch.randn(7, H, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    x, x_true = x_TH.clone().requires_grad_(), x_TH.clone().requires_grad_()
    y, y_true = layer(x), truth(x_true, weights, sorted(ids), k, renormalize)
    dy = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(seed + 2))
    y.backward(dy)
    y_true.backward(dy)
    assert relative(y, y_true) < 1e-10
    assert relative(x.grad, x_true.grad) < 1e-10
    if trains:
        for name, whole in zip(("router", "w_in", "w_out"), weights, strict=True):
            found, want = getattr(layer, name).grad, whole.grad[trains]
            assert (found - want).norm() <= 1e-10 * (1 + want.norm()), name


def test_shape_of_x_is_kept_and_a_wrong_width_is_named():
    layer = MoE(H, I, E, K, dtype=torch.float64)
    assert layer(torch.randn(2, 3, H, dtype=torch.float64)).shape == (2, 3, H)
    assert layer(torch.randn(0, H, dtype=torch.float64)).shape == (0, H)  # no token at all
    with pytest.raises(ValueError, match=r"13 wide.*hidden_size=12"):
        layer(torch.randn(2, 13, dtype=torch.float64))


@pytest.mark.parametrize(("held", "trains"), [((1, 4), (1,)), ((0, 2, 5), ()), ((3,), (3,)), (range(E), (0, 5))])
def test_inv5_no_byte_of_absent_experts_and_no_parameter_of_frozen_ones(held, trains):
    layer = MoE.from_dense(*dense(), K, permitted=mask(*held), trainable=mask(*trains))
    expert = (2 * I * H + H * I) * 8
    stored = sum(t.numel() * t.element_size() for t in [*layer.parameters(), *layer.buffers()])
    assert stored == len(held) * expert + E * H * 8
    trainable = sum(p.numel() * p.element_size() for p in layer.parameters())
    assert trainable == len(trains) * (expert + H * 8)
    kept_alive = {t.untyped_storage().nbytes() for t in layer.parameters()}
    assert kept_alive == {p.numel() * p.element_size() for p in layer.parameters()}, "a view keeps a whole tensor alive"


def test_inv5_frozen_and_absent_keep_their_bits_through_adamw_with_weight_decay():
    weights = dense()
    layer = MoE.from_dense(*weights, K, permitted=mask(0, 2, 3, 5), trainable=mask(2, 5))
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randn(16, H, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
    after = layer.global_state()
    router, w_in, w_out = weights
    for place, e in enumerate(after.experts):
        same = torch.equal(after.w_in[place], w_in[e]) and torch.equal(after.w_out[place], w_out[e])
        assert same == (e in (0, 3)), e
    assert [torch.equal(after.router[e], router[e]) for e in range(E)] == [e not in (2, 5) for e in range(E)]
    rows = {tuple(s["exp_avg"].shape) for s in optimizer.state.values()}
    assert rows == {(2, H), (2, 2 * I, H), (2, H, I)}
    assert layer.w_in_frozen.grad is None
    assert layer.router_rest.grad is None


def test_inv2_a_layer_that_trains_nothing_keeps_no_gradient_alive() -> None:
    """An empty view of a whole router's gradient held 8 KB that no plan counted; importance is as before."""
    x = torch.randn(16, H, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    layers = [
        MoE.from_dense(*dense(), K, permitted=mask(0, 2, 3), trainable=trains, with_scores=True)
        for trains in (mask(), mask(0, 2, 3))
    ]
    for layer in layers:
        layer(x).square().sum().backward()
    assert all(p.grad is None or p.grad.untyped_storage().nbytes() == 0 for p in layers[0].parameters())
    assert layers[1].router.grad is not None
    torch.testing.assert_close(layers[0].scores.taylor_abs_B, layers[1].scores.taylor_abs_B)
    assert (layers[0].scores.taylor_abs_B > 0).all()


def test_inv5_frozen_router_has_no_parameter_row():
    layer = MoE.from_dense(*dense(), K, trainable=mask(1, 2), train_router=False)
    assert layer.router.numel() == 0
    assert set(layer.trained_state()) == {"w_in", "w_out"}
    layer(torch.randn(5, H, dtype=torch.float64)).sum().backward()
    assert torch.equal(layer.router_EH(), dense()[0])


def test_slots_put_trainable_experts_first_in_ascending_id():
    layer = MoE.from_dense(*dense(), K, permitted=mask(0, 1, 4, 5), trainable=mask(1, 5))
    assert layer.experts == (1, 5, 0, 4)
    assert layer.slot_map.slot_of_expert.tolist() == [2, 0, -1, -1, 3, 1]
    w_in = dense()[1]
    assert torch.equal(layer.w_in, w_in[[1, 5]])
    assert torch.equal(layer.w_in_frozen, w_in[[0, 4]])


def test_set_experts_keeps_what_stays_bit_for_bit_and_takes_the_rest_from_the_source():
    layer = MoE.from_dense(*dense(0), K, permitted=mask(0, 2, 3), trainable=mask(2))
    with torch.no_grad():
        layer.w_in.add_(1.0)
        layer.router.add_(1.0)
    before, other = layer.global_state(), dense(1)
    source = LayerState((2, 5), other[0], other[1][[2, 5]], other[2][[2, 5]])
    layer.set_experts(mask(2, 3, 5), mask(3, 5), source=source)
    after = layer.global_state()
    assert after.experts == (2, 3, 5)
    for name in ("w_in", "w_out"):
        old, new = getattr(before, name), getattr(after, name)
        assert torch.equal(new[0], old[1])  # expert 2: held before, so the source's copy of it is not read
        assert torch.equal(new[1], old[2])
    assert torch.equal(after.w_in[2], other[1][5])
    assert torch.equal(after.router, before.router)
    assert layer.experts == (3, 5, 2)


def test_set_experts_without_a_source_for_a_new_expert_changes_nothing():
    layer = MoE.from_dense(*dense(), K, permitted=mask(0, 2))
    with pytest.raises(ValueError, match=r"expert 4 is new.*pass a source"):
        layer.set_experts(mask(2, 4))
    assert layer.experts == (0, 2)
    layer.set_experts(mask(2))
    assert layer.experts == (2,)


def test_load_global_and_global_state_round_trip_without_aliases():
    weights = dense(3)
    layer = MoE(H, I, E, K, dtype=torch.float64)
    layer.load_global(LayerState.whole(*weights), trainable=mask(4, 1))
    state = layer.global_state()
    for name, weight in zip(("router", "w_in", "w_out"), weights, strict=True):
        assert torch.equal(getattr(state, name), weight), name
    with torch.no_grad():
        for tensor in [*layer.parameters(), *layer.buffers()]:
            tensor.zero_()
    assert all(torch.equal(w, again) for w, again in zip(weights, dense(3), strict=True)), "the source was aliased"
    assert torch.equal(state.w_in, weights[1]), "the state was aliased"


def test_trained_state_is_a_view_in_ascending_expert_id():
    layer = MoE.from_dense(*dense(), K, permitted=mask(0, 3, 4, 5), trainable=mask(5, 3))
    views = layer.trained_state()
    assert torch.equal(views["router"], dense()[0][[3, 5]])
    assert torch.equal(views["w_out"], dense()[2][[3, 5]])
    with torch.no_grad():
        layer.w_out.zero_()
    assert not views["w_out"].any()
    assert not views["w_out"].requires_grad
    layer.set_experts(mask(0, 3), mask())
    assert layer.trained_state() == {}


def test_padding_is_neither_routed_nor_counted():
    layer = MoE.from_dense(*dense(), K, with_stats=True)
    x_TH = torch.randn(9, H, dtype=torch.float64)
    real = torch.arange(9) < 5
    alone = layer(x_TH[:5])
    stats_alone = layer.last_stats
    layer.token_mask = real
    padded = layer(x_TH)
    assert torch.equal(padded[:5], alone)
    assert not padded[5:].any()
    assert layer.last_stats.tokens == 5
    assert torch.allclose(layer.last_stats.prob_sum_E, stats_alone.prob_sum_E)
    layer.token_mask = None
    assert torch.equal(layer(x_TH, real), padded)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_counts_once_and_gives_the_same_gradients(reentrant):
    results = []
    for wrap in (False, True):
        layer = MoE.from_dense(*dense(), K, permitted=mask(0, 1, 4), with_stats=True, with_scores=True)
        x = torch.randn(8, H, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = checkpoint(layer, x, use_reentrant=reentrant) if wrap else layer(x)
        y.square().sum().backward()
        assert layer.last_stats.tokens == 8
        grads = [x.grad, layer.w_in.grad, layer.w_out.grad, layer.router.grad]
        results.append((grads, layer.scores.taylor_abs_B.clone(), layer.last_stats.hits_E))
    for plain, again in zip(results[0][0], results[1][0], strict=True):
        assert torch.equal(plain, again)
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][1].any()
    assert torch.equal(results[0][2], results[1][2])


def test_scores_belong_to_a_set_of_experts_and_no_optimizer_sees_them():
    layer = MoE.from_dense(*dense(), K, with_scores=True)
    assert len(list(layer.parameters())) == 3
    layer(torch.randn(8, H, dtype=torch.float64)).sum().backward()
    assert layer.scores.rows_B.sum() == 16
    layer.set_experts(mask(0, 3))
    assert layer.scores.rows_B.tolist() == [0, 0]
    layer.with_scores = False
    assert layer.scores is None


def test_demand_for_absent_experts_stays_measurable():
    layer = MoE.from_dense(*dense(), K, permitted=mask(0, 3), with_stats=True)
    x_TH = torch.randn(30, H, dtype=torch.float64)
    layer(x_TH)
    prob_TE = (x_TH @ dense()[0].T).softmax(dim=-1)
    assert torch.allclose(layer.last_stats.prob_sum_E, prob_TE.sum(dim=0))
    assert torch.allclose(layer.last_stats.lost_mass, prob_TE[:, [1, 2, 4, 5]].sum())


def test_top_k_can_be_lowered():
    layer = MoE.from_dense(*dense(), 3)
    layer.top_k = 1
    x_TH = torch.randn(6, H, dtype=torch.float64)
    assert relative(layer(x_TH), truth(x_TH, dense(), range(E), k=1)) < 1e-10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 7}, "top_k=7 of 6 experts"),
        ({"top_k": 0}, "top_k=0"),
        ({"permitted": mask()}, "no expert is permitted"),
        ({"permitted": mask(0), "trainable": mask(0, 1)}, "trainable expert 1 is not permitted"),
        ({"permitted": [0, 3]}, "permitted is int64"),
        ({"trainable": np.ones(5, dtype=bool)}, r"trainable is bool of shape \(5,\)"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        MoE(H, I, E, **{"top_k": K} | arguments)


def test_tensors_of_another_shape_are_refused_before_anything_changes():
    layer = MoE.from_dense(*dense(), K)
    router, w_in, w_out = dense()
    with pytest.raises(ValueError, match="w_out has shape"):
        layer.load_global(LayerState.whole(router, w_in, w_out.transpose(1, 2)))
    assert torch.equal(layer.global_state().w_in, w_in)


def test_a_state_dict_of_other_experts_is_refused():
    one, other = (MoE.from_dense(*dense(), K, permitted=mask(*ids)) for ids in ((0, 1), (0, 2)))
    with pytest.raises(RuntimeError, match=r"holds experts \[0, 1\], this layer \[0, 2\]"):
        other.load_state_dict(one.state_dict())
    again = MoE.from_dense(*dense(1), K, permitted=mask(0, 1))
    again.load_state_dict(one.state_dict())
    assert torch.equal(again.w_in, one.w_in)


def test_balance_loss_is_the_switch_loss_of_each_layer():
    layers = [MoE.from_dense(*dense(seed), K) for seed in (0, 1)]
    x_TH = torch.randn(40, H, dtype=torch.float64)
    real = torch.arange(40) < 33
    with recording(layers) as tape:
        for layer in layers:
            layer(x_TH, real)
        loss = balance_loss(tape)
        with pytest.raises(ValueError, match="layer 0 has no logits on the tape"):
            balance_loss(tape)
    logits = [(x_TH[:33] @ dense(seed)[0].T).float() for seed in (0, 1)]
    # transformers counts hits per token, not per choice: k times ours.
    want = sum(load_balancing_loss_func((logit,), E, K) for logit in logits) / len(layers) / K
    assert torch.allclose(loss, want)
    loss.backward()
    assert all(layer.router.grad.norm() > 0 for layer in layers)


def test_balance_loss_is_one_when_every_expert_is_asked_alike():
    layer = MoE.from_dense(torch.eye(E, H, dtype=torch.float64), *dense()[1:], 1)
    with recording(layer) as tape:
        layer(torch.eye(E, H, dtype=torch.float64))
        assert abs(balance_loss(tape).item() - 1) < 1e-6


def test_the_layer_compiles_into_one_graph_with_its_measurements():
    layer = MoE.from_dense(*dense(0, torch.float32), K, permitted=mask(0, 1, 4), with_stats=True, with_scores=True)
    x = torch.randn(8, H)
    eager = layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert relative(compiled, eager) < 1e-6
    compiled.sum().backward()
    assert layer.last_stats.tokens == 8
    assert layer.scores.rows_B.sum() == 16


def few_bits(form, trains=(1, 4), **options):
    """A layer of 64 columns whose experts 0, 1, 4 and 5 are held, those that do not train in few bits."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(s, generator=generator, dtype=torch.float64) for s in ((E, 64), (E, 64, 64), (E, 64, 32))]
    held = mask(0, 1, 4, 5)
    return weights, MoE.from_dense(*weights, K, permitted=held, trainable=mask(*trains), frozen_format=form, **options)


@pytest.mark.parametrize("form", FORMATS)
def test_frozen_experts_in_few_bits_run_as_what_their_codes_say(form):
    weights, layer = few_bits(form)
    state = layer.global_state()
    assert state.experts == (0, 1, 4, 5)
    assert torch.equal(state.w_in[[1, 2]], weights[1][[1, 4]])  # those that train are exact
    assert 0 < relative(state.w_in, weights[1][[0, 1, 4, 5]]) < {"int8": 0.01, "fp8_e4m3": 0.04}.get(form, 0.15)
    x = torch.randn(7, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    dense_of = MoE.from_dense(weights[0][[0, 1, 4, 5]], state.w_in, state.w_out, K)
    assert relative(layer(x), dense_of(x)) < 1e-12
    stored = sum(t.nbytes for n, t in layer.named_buffers() if n != "router_rest")
    assert stored == 2 * (FORMATS[form].bytes_of(64, 64) + FORMATS[form].bytes_of(64, 32))


@pytest.mark.parametrize("form", FORMATS)
def test_codes_keep_their_bits_when_the_experts_change(form):
    weights, layer = few_bits(form)
    codes = {e: layer.w_in_frozen[i].clone() for i, e in enumerate(layer.frozen_experts)}
    layer.set_experts(mask(0, 1, 5), mask(1))
    assert all(same(layer.w_in_frozen[i], codes[e]) for i, e in enumerate(layer.frozen_experts))
    with pytest.raises(ValueError, match=f"expert 0 is held as {form}"):
        layer.set_experts(mask(0, 1, 5), mask(0, 1))
    layer.set_experts(mask(0, 1, 5), mask(0, 1), source=LayerState.whole(*weights))
    assert torch.equal(layer.w_in[0], weights[1][0])
    layer.set_experts(mask(0, 1), mask(0, 1))
    assert layer.w_in_frozen.shape[0] == 0
    assert layer(torch.randn(3, 64, dtype=torch.float64)).isfinite().all()


@pytest.mark.parametrize("form", FORMATS)
def test_what_is_stored_stays_so_whatever_the_layer_is_cast_to(form):
    layer = few_bits(form)[1]
    before = {n: t.clone() for n, t in layer.named_buffers() if n != "router_rest"}
    layer.to(torch.bfloat16)
    assert layer.w_in.dtype == torch.bfloat16
    assert all(t.dtype == before[n].dtype and same(t, before[n]) for n, t in layer.named_buffers() if n in before)
    assert layer(torch.randn(3, 64, dtype=torch.bfloat16)).isfinite().all()
    again = few_bits(form)[1].to(torch.bfloat16)
    again.load_state_dict(layer.state_dict())
    assert same(again.w_in_frozen, layer.w_in_frozen)
    assert few_bits(form)[1].to("meta").w_in_scale.device.type == "meta"


def same(a, b):
    """Bit for bit, in dtypes that `torch.equal` does not know, too."""
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_few_bits_need_columns_that_32_divides():
    with pytest.raises(ValueError, match="32 divides, not 12"):
        MoE(H, I, E, K, frozen_format="int8")
    with pytest.raises(ValueError, match="format 'int5' does not exist"):
        MoE(64, 64, E, K, frozen_format="int5")


def test_recompute_and_rows_per_slot_change_no_bit():
    gradients = []
    for options in ({}, {"recompute": True, "rows_per_slot": 3}):
        layer = MoE.from_dense(*dense(), K, permitted=mask(0, 1, 5), trainable=mask(1), **options)
        assert layer.slot_map.rows_per_slot == options.get("rows_per_slot")
        x = torch.randn(7, H, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
        layer(x).pow(2).sum().backward()
        gradients.append((x.grad, layer.w_in.grad, layer.w_out.grad, layer.router.grad))
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
