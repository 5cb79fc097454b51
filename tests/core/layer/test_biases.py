"""Biases of experts and router, corrected routing, routing in groups: stored, trained and moved as rows are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from layer_cases import E, H, I, K, mask, relative
from torch import Tensor

from fedmoe_core import LayerState, MoE, RoutingRule, SharedExpert
from fedmoe_core.layer.lora import FACTORS, LayerLora
from fedmoe_core.layer.state import BIASES, MATRICES, STEERING
from fedmoe_kernels import reference

OPEN = RoutingRule("topk_softmax"), "swiglu_oai", ("bias_in", "bias_out", "router_bias")  # gpt-oss
GROUPED = RoutingRule("sigmoid", groups=(3, 2), scale=2.5), "swiglu", ("correction_bias",)  # DeepSeek-V3
ALL = RoutingRule("sigmoid", renormalize=False), "relu", ("bias_in", "bias_out", "router_bias", "correction_bias")
KINDS = {"gpt-oss": OPEN, "DeepSeek-V3": GROUPED, "all": ALL}


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def whole_of(kind: str, seed: int = 0) -> LayerState:
    """O(1) tensors of a whole layer."""
    _, activation, biases = KINDS[kind]
    layer = MoE(H, I, E, K, activation=activation)
    shapes = {"bias_in": (E, layer.width), "bias_out": (E, H), "router_bias": (E,), "correction_bias": (E,)}
    shapes = {"router": (E, H), "w_in": (E, layer.width, H), "w_out": (E, H, I)} | {n: shapes[n] for n in biases}
    return LayerState.of({name: drawn(seed + place, *shape) for place, (name, shape) in enumerate(shapes.items())})


def made(kind: str, state: LayerState, **options: object) -> MoE:
    rule, activation, _ = KINDS[kind]
    return MoE.of(state, K, rule=rule, activation=activation, **options)


def truth(kind: str, x_TH: Tensor, state: LayerState, ids: list[int]) -> Tensor:
    """The dense layer that has only the experts ``ids``, by plain loops."""
    rule, activation, _ = KINDS[kind]
    slot_E = torch.tensor([ids.index(e) if e in ids else -1 for e in range(E)])
    logits_TE = x_TH @ state.router.T + (0.0 if state.router_bias is None else state.router_bias)
    routing = reference.route(
        logits_TE,
        K,
        slot_of_expert=slot_E,
        scoring=rule.scoring,
        renormalize=rule.renormalize,
        bias_E=state.correction_bias,
        groups=rule.groups,
        scale=rule.scale,
    )
    own = {name: None if (whole := getattr(state, name)) is None else whole[ids] for name in (*MATRICES, *BIASES)}
    return reference.moe_mlp(x_TH, routing.slots_TK, routing.weights_TK, activation=activation, **own)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("held", "trains"), [(range(E), range(E)), ((0, 2, 3, 5), (2, 5)), ((1, 4), (1, 4)), ((3,), ())]
)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_layer_is_the_dense_sub_model(kind: str, held: range, trains: range, backend: str) -> None:
    whole = whole_of(kind)
    leaves = {n: t.clone().requires_grad_(n != "correction_bias") for n, t in whole.tensors.items()}
    state = LayerState.of(leaves)
    layer = made(kind, whole, permitted=mask(*held), trainable=mask(*trains), backend=backend)
    x_TH = drawn(50, 9, H)
    x, x_true = x_TH.clone().requires_grad_(), x_TH.clone().requires_grad_()
    y, y_true = layer(x), truth(kind, x_true, state, list(held))
    dy = drawn(51, *y.shape)
    y.backward(dy)
    y_true.backward(dy)
    assert relative(y, y_true) < 1e-10
    assert relative(x.grad, x_true.grad) < 1e-10
    assert {n for n, p in layer.named_parameters() if p.requires_grad and p.numel()} == set(
        (*layer._steering, *layer._slotted) if list(trains) else ()
    )
    for name in (*layer._steering, *layer._slotted) if list(trains) else ():
        want = getattr(state, name).grad[list(trains)]
        assert (getattr(layer, name).grad - want).norm() <= 1e-10 * (1 + want.norm()), name
    assert layer.correction_bias is None or not layer.correction_bias.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_inv5_absent_experts_have_no_byte_and_frozen_ones_keep_their_bits(kind: str) -> None:
    state = whole_of(kind)
    layer = made(kind, state, permitted=mask(0, 2, 3, 5), trainable=mask(2, 5))
    per_expert = sum(getattr(state, name)[0].nbytes for name in layer._slotted)
    always = sum(t.nbytes for name, t in state.tensors.items() if name not in layer._slotted)
    assert sum(t.nbytes for t in (*layer.parameters(), *layer.buffers())) == 4 * per_expert + always
    steering = sum(getattr(state, name)[0].nbytes for name in layer._steering)
    assert sum(p.nbytes for p in layer.parameters()) == 2 * (per_expert + steering)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.5)
    for step in range(3):
        optimizer.zero_grad()
        layer(drawn(60 + step, 24, H)).square().sum().backward()
        optimizer.step()
    after = layer.global_state()
    for name in layer._slotted:
        rows = zip(getattr(after, name), getattr(state, name)[list(after.experts)], strict=True)
        same = [torch.equal(*pair) for pair in rows]
        assert same == [True, False, True, False], name
    for name in layer._steering:
        rows = zip(getattr(after, name), getattr(state, name), strict=True)
        assert [torch.equal(*pair) for pair in rows] == [e not in (2, 5) for e in range(E)], name
    if state.correction_bias is not None:
        assert torch.equal(after.correction_bias, state.correction_bias)


@pytest.mark.parametrize("kind", KINDS)
def test_experts_come_and_go_with_their_biases(kind: str) -> None:
    state = whole_of(kind)
    layer = made(kind, state, permitted=mask(0, 2), trainable=mask(2))
    layer.set_experts(mask(0, 1, 4), mask(0, 4), source=state)
    found = layer.global_state()
    assert found.experts == (0, 1, 4)
    for name, tensor in found.tensors.items():
        want = getattr(state, name)
        assert torch.equal(tensor, want[[0, 1, 4]] if name in (*MATRICES, *BIASES) else want), name
    again = MoE(H, I, E, K, permitted=mask(0, 1, 4), trainable=mask(0, 4), dtype=torch.float64, **as_made(kind))
    again.load_state_dict(layer.state_dict())
    x = drawn(70, 5, H)
    assert torch.equal(again(x), layer(x))
    assert set(layer.trained_state()) == {*layer._steering, *layer._slotted}
    layer.train_router = False
    layer.set_experts(mask(0, 1, 4), mask(0))
    assert set(layer.trained_state()) == set(layer._slotted)
    assert layer.router_bias is None or layer.router_bias.numel() == 0


def as_made(kind: str) -> dict[str, object]:
    """The constructor's options that give the layer of a kind."""
    rule, activation, biases = KINDS[kind]
    flags = {"expert_bias": "bias_in" in biases, "router_bias": "router_bias" in biases}
    return {"rule": rule, "activation": activation, "correction_bias": "correction_bias" in biases, **flags}


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_layer_has_biases_of_zero(kind: str) -> None:
    layer = MoE(H, I, E, K, dtype=torch.float64, **as_made(kind))
    found = layer.global_state().tensors
    assert set(found) == {"router", "w_in", "w_out", *KINDS[kind][2]}
    assert all(bool((tensor == 0).all()) == (name not in ("router", "w_in", "w_out")) for name, tensor in found.items())


def test_own_rows_and_aliases_bring_their_biases() -> None:
    state, other = whole_of("gpt-oss"), whole_of("gpt-oss", 30)
    names = ("w_in", "w_out", "bias_in", "bias_out", "router", "router_bias")
    own = {name: {2: getattr(other, name)[2]} for name in names}
    alias = np.array([2, -1, -1, -1, -1, -1])
    layer = made("gpt-oss", state)
    layer.load_global(state, permitted=mask(2, 3), trainable=mask(2), rows=own, alias=alias)
    served = {name: getattr(state, name).clone() for name in names}
    for name in names:
        served[name][2] = getattr(other, name)[2]
        if name not in STEERING:
            served[name][0] = getattr(other, name)[2]
    x = drawn(80, 7, H)
    assert relative(layer(x), truth("gpt-oss", x, LayerState.of(served), [0, 2, 3])) < 1e-10
    with pytest.raises(ValueError, match="row of bias_in is given for expert 4, which is not held"):
        layer.load_global(state, permitted=mask(2, 3), rows={"bias_in": {4: other.bias_in[4]}})


def test_adapters_leave_the_biases_frozen() -> None:
    state = whole_of("gpt-oss")
    fresh = LayerLora.fresh(state.w_in, state.w_out, rank=3, scale=0.7, seed=0)
    lora = LayerLora.of({n: drawn(90 + i, *f.shape) for i, (n, f) in enumerate(fresh.factors.items())}, 0.7)
    layer = made("gpt-oss", state)
    layer.load_global(replace(state, lora=lora), permitted=mask(0, 2, 5), trainable=mask(2))
    merged = {n: getattr(state, n) + 0.7 * getattr(lora, f"b{n[1:]}") @ getattr(lora, f"a{n[1:]}") for n in MATRICES}
    x = drawn(99, 7, H)
    assert relative(layer(x), truth("gpt-oss", x, replace(state, **merged), [0, 2, 5])) < 1e-10
    layer(x).square().sum().backward()
    assert {n for n, p in layer.named_parameters() if p.grad is not None and p.numel()} == {*STEERING, *FACTORS}


def test_frozen_matrices_in_few_bits_keep_their_biases_whole() -> None:
    wide = {"router": (E, 32), "w_in": (E, 128, 32), "w_out": (E, 32, 64), "bias_in": (E, 128), "bias_out": (E, 32)}
    state = LayerState.of({name: drawn(i, *shape).float() for i, (name, shape) in enumerate(wide.items())})
    layer = MoE.of(state, K, permitted=mask(0, 1, 4), trainable=mask(4), frozen_format="int8", activation="swiglu_oai")
    assert torch.equal(layer.bias_in_frozen, state.bias_in[[0, 1]])
    assert layer.w_in_frozen.dtype == torch.int8
    layer.bfloat16()
    assert (layer.bias_out_frozen.dtype, layer.w_in_frozen.dtype) == (torch.bfloat16, torch.int8)
    layer.float().set_experts(mask(0, 1, 4), mask(4, 1), source=state)
    assert torch.equal(layer.bias_in[0], state.bias_in[1].bfloat16().float())  # its own, rounded above


def test_the_correction_bias_is_not_rounded_to_16_bits() -> None:
    state = whole_of("DeepSeek-V3")
    layer = made("DeepSeek-V3", state)
    assert layer.float().correction_bias.dtype == torch.float32
    assert layer.bfloat16().correction_bias.dtype == torch.float32
    assert torch.equal(layer.correction_bias, state.correction_bias.float())
    assert layer.double().correction_bias.dtype == torch.float64
    assert layer.router.dtype == torch.float64


def test_what_does_not_fit_is_named() -> None:
    state = whole_of("gpt-oss")
    plain = LayerState.whole(state.router, state.w_in, state.w_out)
    with pytest.raises(ValueError, match=r"router_bias is missing; this layer needs it with shape \(6,\)"):
        made("gpt-oss", state).load_global(plain)
    with pytest.raises(ValueError, match=r"(bias_in|bias_out|router_bias) is given; this layer has none"):
        MoE.of(plain, K).load_global(state)
    with pytest.raises(ValueError, match=r"router_bias has shape \(5,\); this layer needs \(6,\)"):
        made("gpt-oss", state).load_global(replace(state, router_bias=state.router_bias[:5]))
    with pytest.raises(ValueError, match="'bias' is not a tensor of a layer"):
        LayerState.of({"router": state.router, "bias": state.router})
    with pytest.raises(ValueError, match="a correction bias needs scoring='sigmoid', not 'softmax'"):
        MoE(H, I, E, K, correction_bias=True)
    with pytest.raises(ValueError, match=r"groups=\(4, 2\) do not fit 6 experts"):
        MoE(H, I, E, K, rule=RoutingRule("sigmoid", groups=(4, 2)))
    with pytest.raises(ValueError, match="activation is 'tanh'; choose one of swiglu"):
        MoE(H, I, E, K, activation="tanh")
    with pytest.raises(ValueError, match="scoring='top' is unknown"):
        RoutingRule("top")
    with pytest.raises(ValueError, match="groups belong to scoring='sigmoid'"):
        RoutingRule(groups=(2, 1))
    with pytest.raises(ValueError, match=r"scale=0\.0 is out of range"):
        RoutingRule(scale=0.0)


@pytest.mark.parametrize("gated", [False, True])
def test_a_shared_expert_serves_every_token_of_every_sub_layer(gated: bool) -> None:
    state = whole_of("DeepSeek-V3")
    shared = SharedExpert(H, 7, gated=gated, dtype=torch.float64)
    layer = made("DeepSeek-V3", state, permitted=mask(1, 4), trainable=mask(4), shared=shared)
    alone = made("DeepSeek-V3", state, permitted=mask(1, 4), trainable=mask(4))
    x = drawn(5, 2, 4, H)
    real_T = torch.arange(8) < 5
    want = (x @ shared.w_in[:7].T).sigmoid() * (x @ shared.w_in[:7].T) * (x @ shared.w_in[7:].T) @ shared.w_out.T
    want = want * (x @ shared.gate.T).sigmoid() if gated else want
    assert relative(layer(x, real_T), alone(x, real_T) + want) < 1e-12
    layer(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in shared.parameters())
    assert not {id(p) for p in layer.own_parameters()} & {id(p) for p in shared.parameters()}
    assert len(layer.own_parameters()) + len(list(shared.parameters())) == len(list(layer.parameters()))
    layer.set_experts(mask(1), mask())
    assert layer.shared is shared
    assert "shared" not in "".join(layer.trained_state())
