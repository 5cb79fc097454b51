"""The reference itself, against torch.nn.functional, hand-worked numbers and the identities it must satisfy."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fedmoe_kernels import reference

GATED = ("swiglu", "geglu", "geglu_tanh", "swiglu_oai", "swiglu_clamped", "swiglu_clamped:2.5")
ACTIVATIONS = (*GATED, "relu", "relu2", "gelu", "gelu_tanh", "silu")
B, HIDDEN, INNER, RANK = 4, 5, 3, 2

# Slot 2 holds no row, slot 3 serves one token twice, the last token has no row at all.
SLOTS_TK = torch.tensor([[0, 1], [3, 3], [1, -1], [0, 3], [-1, -1]])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def experts(activation: str) -> dict[str, Tensor]:
    wide = INNER * (2 if activation in GATED else 1)
    return {
        "w_in": draw(B, wide, HIDDEN, seed=1),
        "w_out": draw(B, HIDDEN, INNER, seed=2),
        "bias_in": draw(B, wide, seed=3),
        "bias_out": draw(B, HIDDEN, seed=4),
    }


def adapters() -> SimpleNamespace:
    return SimpleNamespace(
        a_in=draw(B, RANK, HIDDEN, seed=5),
        b_in=draw(B, 2 * INNER, RANK, seed=6),
        a_out=draw(B, RANK, INNER, seed=7),
        b_out=draw(B, HIDDEN, RANK, seed=8),
        scale=torch.tensor([0.5, 1.0, 2.0, -1.0], dtype=torch.float64),
        base_of_slot_B=torch.tensor([0, 0, 1, 1]),
    )


@pytest.fixture
def tokens() -> tuple[Tensor, Tensor, Tensor]:
    """x_TH, the upstream gradient dy_TH, and routing weights s_TK."""
    return draw(5, HIDDEN, seed=9), draw(5, HIDDEN, seed=10), draw(5, 2, seed=11)


@pytest.mark.parametrize(
    ("scoring", "renormalize", "expected"),
    [
        ("softmax", True, lambda z: torch.stack([z[2].exp(), z[0].exp()]) / (z[2].exp() + z[0].exp())),
        ("softmax", False, lambda z: z.softmax(-1)[[2, 0]]),
        ("topk_softmax", False, lambda z: z[[2, 0]].softmax(-1)),
        ("sigmoid", True, lambda z: z[[2, 0]].sigmoid() / z[[2, 0]].sigmoid().sum()),
        ("sigmoid", False, lambda z: z[[2, 0]].sigmoid()),
    ],
)
def test_route_gives_the_weights_of_each_rule(scoring, renormalize, expected):
    logits_E = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
    truth = reference.route(logits_E[None], 2, scoring=scoring, renormalize=renormalize, scale=3.0)
    assert truth.experts_TK.tolist() == [[2, 0]]
    torch.testing.assert_close(truth.weights_TK[0], 3.0 * expected(logits_E), rtol=1e-14, atol=0)


def test_route_worked_by_hand():
    """Experts 1 and 3 absent; token 1 is padding, token 2 holds a NaN, token 3 a tie, token 4 nothing but NaN."""
    nan, inf, e = math.nan, math.inf, math.e
    logits_TE = torch.tensor(
        [[0, 9, 1, 5], [1, 1, 1, 1], [nan, 0, 2, 0], [3, -inf, 3, 0], [nan, nan, nan, nan]], dtype=torch.float64
    )
    valid_T = torch.tensor([True, False, True, True, True])
    truth = reference.route(logits_TE, 2, slot_of_expert=torch.tensor([1, -1, 0, -1]), valid_T=valid_T)
    assert truth.experts_TK.tolist() == [[2, 0], [-1, -1], [2, -1], [0, 2], [-1, -1]]
    assert truth.slots_TK.tolist() == [[0, 1], [-1, -1], [0, -1], [1, 0], [-1, -1]]
    expected = [[e / (e + 1), 1 / (e + 1)], [0, 0], [1, 0], [0.5, 0.5], [0, 0]]
    torch.testing.assert_close(truth.weights_TK, torch.tensor(expected, dtype=torch.float64))
    assert truth.places_R.tolist() == [0, 4, 7, 1, 6, -1, -1, -1, -1, -1]
    assert truth.tokens_R.tolist() == [0, 2, 3, 0, 3, -1, -1, -1, -1, -1]
    assert truth.rows_TK.tolist() == [[0, 3], [-1, -1], [1, -1], [4, 2], [-1, -1]]
    assert truth.offsets_B1.tolist() == [0, 3, 5]
    assert float(truth.stats["tokens"]) == 3
    assert truth.stats["hits_E"].tolist() == [1, 2, 2, 1]  # tokens 0, 2, 3 would take {1, 3}, {2, 1}, {0, 2}


def test_route_groups_and_bias_choose_but_do_not_weigh():
    """Two groups of two: the bias lifts group {0, 1} above {2, 3}; the third place must come from outside it."""
    logits_TE = torch.tensor([[0.0, 0.0, 3.0, 2.0]], dtype=torch.float64)
    bias_E = torch.tensor([1.0, 2.0, 0.0, 0.0], dtype=torch.float64)
    truth = reference.route(logits_TE, 3, scoring="sigmoid", bias_E=bias_E, groups=(2, 1), renormalize=False)
    assert truth.experts_TK.tolist() == [[1, 0, 2]]
    torch.testing.assert_close(truth.weights_TK, logits_TE[:, [1, 0, 2]].sigmoid())


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        ("swiglu", lambda g, u: functional.silu(g) * u),
        ("geglu", lambda g, u: functional.gelu(g) * u),
        ("geglu_tanh", lambda g, u: functional.gelu(g, approximate="tanh") * u),
        ("swiglu_oai", lambda g, u: (u.clamp(-7, 7) + 1) * g.clamp(max=7) * torch.sigmoid(1.702 * g.clamp(max=7))),
        ("swiglu_oai:3", lambda g, u: (u.clamp(-3, 3) + 1) * g.clamp(max=3) * torch.sigmoid(1.702 * g.clamp(max=3))),
        ("swiglu_clamped", lambda g, u: functional.silu(g.clamp(max=10)) * u.clamp(-10, 10)),
        ("swiglu_clamped:2.5", lambda g, u: functional.silu(g.clamp(max=2.5)) * u.clamp(-2.5, 2.5)),
    ],
)
def test_gated_activations_read_gate_then_up(activation, expected):
    gate, up = 6 * draw(200, seed=1), 6 * draw(200, seed=2)  # beyond the clamps, up to 10
    torch.testing.assert_close(reference.activate(torch.cat([gate, up]), activation), expected(gate, up))


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        ("relu", functional.relu),
        ("relu2", lambda z: functional.relu(z).square()),
        ("gelu", functional.gelu),
        ("gelu_tanh", lambda z: functional.gelu(z, approximate="tanh")),
        ("silu", functional.silu),
    ],
)
def test_plain_activations(activation, expected):
    torch.testing.assert_close(reference.activate(draw(50), activation), expected(draw(50)))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_moe_mlp_is_a_weighted_sum_of_dense_experts(activation, tokens):
    (x_TH, _, s_TK), w = tokens, experts(activation)
    y_TH = reference.moe_mlp(x_TH, SLOTS_TK, s_TK, activation=activation, **w)
    z_BTF = torch.einsum("bfh,th->btf", w["w_in"], x_TH) + w["bias_in"][:, None]
    out_BTH = torch.einsum("bhi,bti->bth", w["w_out"], reference.activate(z_BTF, activation)) + w["bias_out"][:, None]
    gate_BT = torch.stack([(s_TK * (b == SLOTS_TK)).sum(-1) for b in range(B)])
    torch.testing.assert_close(y_TH, torch.einsum("bt,bth->th", gate_BT, out_BTH))


def test_lora_equals_merged_weights(tokens):
    (x_TH, _, s_TK), w, lora = tokens, experts("swiglu"), adapters()
    merged = {name: value[lora.base_of_slot_B] for name, value in w.items()}
    scale = lora.scale[:, None, None]
    merged["w_in"] = merged["w_in"] + scale * (lora.b_in @ lora.a_in)
    merged["w_out"] = merged["w_out"] + scale * (lora.b_out @ lora.a_out)
    y_TH = reference.moe_mlp(x_TH, SLOTS_TK, s_TK, lora=lora, **w)
    torch.testing.assert_close(y_TH, reference.moe_mlp(x_TH, SLOTS_TK, s_TK, **merged))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_inv6_importance_identities(activation, tokens):
    """Sum of s * dS = <W_out, dW_out> + <b_out, db_out>; sum of <z, dz> = <W_in, dW_in> + <b_in, db_in>."""
    x_TH, dy_TH, s_TK = tokens
    w = {name: value.requires_grad_() for name, value in experts(activation).items()}
    reference.moe_mlp(x_TH, SLOTS_TK, s_TK, activation=activation, **w).backward(dy_TH)
    sums = reference.importance(dy_TH, x_TH, SLOTS_TK, s_TK, activation=activation, **w)

    def pulled(name: str) -> Tensor:
        return (w[name].detach() * w[name].grad).flatten(1).sum(-1)

    torch.testing.assert_close(sums["taylor_B"], pulled("w_out") + pulled("bias_out"))
    torch.testing.assert_close(sums["taylor_in_B"], pulled("w_in") + pulled("bias_in"))
    squares = w["w_in"].grad.flatten(1).square().sum(-1) + w["w_out"].grad.flatten(1).square().sum(-1)
    torch.testing.assert_close(sums["grad_sq_B"], squares)
    assert sums["rows_B"].tolist() == [2, 2, 0, 3]
    assert (sums["taylor_abs_B"] >= sums["taylor_B"].abs()).all()


def test_importance_of_one_row_per_slot(tokens):
    """The sums are then s * dS itself, its size and its square, with dS = <dy, expert(x)>."""
    x_TH, dy_TH, s_T1 = (value[:4, :width] for value, width in zip(tokens, (HIDDEN, HIDDEN, 1), strict=True))
    slots_T1, w = torch.tensor([[2], [0], [3], [1]]), experts("swiglu")
    sums = reference.importance(dy_TH, x_TH, slots_T1, s_T1, **w)
    alone_TH = reference.moe_mlp(x_TH, slots_T1, torch.ones_like(s_T1), **w)
    s_ds_B = ((alone_TH * dy_TH).sum(-1) * s_T1[:, 0])[slots_T1[:, 0].argsort()]
    torch.testing.assert_close(sums["taylor_B"], s_ds_B)
    torch.testing.assert_close(sums["taylor_abs_B"], s_ds_B.abs())
    torch.testing.assert_close(sums["fisher_B"], s_ds_B**2)
    reap_B = (alone_TH.norm(dim=1) * s_T1[:, 0].abs())[slots_T1[:, 0].argsort()]
    torch.testing.assert_close(sums["reap_B"], reap_B)


def test_importance_of_frozen_slots_lacks_only_the_weight_gradient(tokens):
    (x_TH, dy_TH, s_TK), w = tokens, experts("geglu")
    full = reference.importance(dy_TH, x_TH, SLOTS_TK, s_TK, activation="geglu", **w)
    trainable_B = torch.tensor([True, False, True, False])
    part = reference.importance(dy_TH, x_TH, SLOTS_TK, s_TK, activation="geglu", trainable_B=trainable_B, **w)
    torch.testing.assert_close(part["grad_sq_B"], full["grad_sq_B"] * trainable_B)
    for name in ("rows_B", "taylor_B", "taylor_abs_B", "fisher_B", "taylor_in_B", "reap_B"):
        assert torch.equal(part[name], full[name]), name


def test_importance_with_lora_counts_the_gradients_of_the_adapters(tokens):
    (x_TH, dy_TH, s_TK), w, lora = tokens, experts("swiglu"), adapters()
    sums = reference.importance(dy_TH, x_TH, SLOTS_TK, s_TK, lora=lora, **w)
    factors = [factor.requires_grad_() for factor in (lora.a_in, lora.b_in, lora.a_out, lora.b_out)]
    reference.moe_mlp(x_TH, SLOTS_TK, s_TK, lora=lora, **w).backward(dy_TH)
    torch.testing.assert_close(sums["grad_sq_B"], sum(f.grad.flatten(1).square().sum(-1) for f in factors))


def test_importance_without_rows_is_zero(tokens):
    x_TH, dy_TH, s_TK = tokens
    sums = reference.importance(dy_TH, x_TH, torch.full_like(SLOTS_TK, -1), s_TK, **experts("swiglu"))
    assert all(value.shape == (B,) and not value.any() for value in sums.values())
