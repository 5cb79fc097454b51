"""Flux's merging: eqs. 1 and 2 against plain re-statements, the unmerged limit, and the error that merging makes."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merging_restated import reroute, uniform_budgets
from torch import Tensor

from fedmoe_core.algorithms.flux.clustering import expert_features
from fedmoe_core.algorithms.flux.merging import Merge, merge_budgets, merge_shares, merged_rows, plan_merge

LAYERS, EXPERTS, HIDDEN, INNER, TOKENS = 4, 16, 16, 32, 300
Layer = tuple[Tensor, Tensor, Tensor, Tensor]


def draw_model(seed: int, skew: tuple[float, ...]) -> list[Layer]:
    """Layers of (w_in, w_out, router, router bias): experts of four kinds, the bias the more uneven the more skew."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    layers = []
    for bias in skew:
        kind = torch.arange(EXPERTS) % 4
        w_in = (normal(4, INNER, HIDDEN)[kind] + 0.5 * normal(EXPERTS, INNER, HIDDEN)) / HIDDEN**0.5
        w_out = (normal(4, HIDDEN, INNER)[kind] + 0.5 * normal(EXPERTS, HIDDEN, INNER)) / HIDDEN**0.5
        layers.append((w_in, w_out, 2 * normal(EXPERTS, HIDDEN) / HIDDEN**0.5, bias * normal(EXPERTS)))
    return layers


def forward(model: list[Layer], x_TH: Tensor, top_k: int, merge: Merge | None = None) -> tuple[Tensor, np.ndarray]:
    """Residual MoE layers, and the share of tokens that each expert was chosen for (L, E)."""
    freq = []
    for layer, (w_in, w_out, router, bias) in enumerate(model):
        normed = HIDDEN**0.5 * x_TH / x_TH.norm(dim=1, keepdim=True)
        weights, experts = torch.softmax(normed @ router.T + bias, dim=1).topk(top_k, dim=1)
        weights = weights / weights.sum(dim=1, keepdim=True)
        freq.append(np.bincount(experts.numpy().ravel(), minlength=EXPERTS) / len(x_TH))
        if merge is not None:
            alias_E = torch.from_numpy(merge.alias_LE[layer])
            experts, weights = reroute(experts, weights, alias_E)
            stored = torch.from_numpy(merge.stored_LE[layer])
            w_in, w_out = merged_rows(w_in, merge, layer), merged_rows(w_out, merge, layer)
            assert len(w_in) == stored.sum()
            slots = torch.cumsum(stored, 0) - 1
            experts = torch.where(experts >= 0, slots[experts.clamp(min=0)], 0)
        out = torch.zeros_like(x_TH)
        for place in range(top_k):
            inner = torch.relu(torch.einsum("tih,th->ti", w_in[experts[:, place]], normed))
            out += weights[:, place, None] * torch.einsum("thi,ti->th", w_out[experts[:, place]], inner)
        x_TH = x_TH + out
    return x_TH, np.array(freq)


def output_errors(seed: int, skew: tuple[float, ...], top_k: int, tuned: int) -> list[float]:
    """Relative output error with slots by eq. 1, uniform, and one per layer; 4 slots a layer on average."""
    model = draw_model(seed, skew)
    x_TH = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(99 + seed), dtype=torch.float64)
    true, freq_LE = forward(model, x_TH, top_k)
    merged_LE = np.argsort(np.argsort(-freq_LE, axis=1, kind="stable"), axis=1, kind="stable") >= tuned
    features = expert_features([(w_in, w_out) for w_in, w_out, _, _ in model], seed=1)
    errors = []
    slots = 4 * LAYERS
    budgets = [merge_budgets(freq_LE, merged_LE, slots), uniform_budgets(merged_LE, slots), np.ones(LAYERS, dtype=int)]
    for budgets_L in budgets:
        merge = plan_merge(features, merged_LE, budgets_L, freq_LE=freq_LE, attention_LE=np.ones_like(freq_LE), seed=3)
        assert (merge.stored_LE.sum(axis=1) == budgets_L + tuned).all()
        errors.append(float((forward(model, x_TH, top_k, merge)[0] - true).norm() / true.norm()))
    return errors


def test_eq1_by_fractions() -> None:
    """Four layers, ample experts: shares of (L - l + 1) / v^l, floors, then largest remainders."""
    rng = np.random.default_rng(0)
    freq = rng.random((4, 32))
    claims = []
    for layer in range(1, 5):
        row = [Fraction(float(f)) for f in freq[layer - 1]]
        mean = sum(row) / 32
        variance = sum((f - mean) ** 2 for f in row) / 32
        claims.append((4 - layer + 1) / (variance + Fraction(1, 10**6)))
    shares = [20 * claim / sum(claims) for claim in claims]
    expected = [int(share) for share in shares]
    by_remainder = sorted(range(4), key=lambda layer: int(shares[layer]) - shares[layer])
    for layer in by_remainder[: 20 - sum(expected)]:
        expected[layer] += 1
    assert min(expected) >= 1
    assert merge_budgets(freq, np.ones((4, 32), dtype=bool), 20).tolist() == expected
    # Shallow and balanced layers get more.
    even = np.tile([0.5, 0.4], (3, 8))
    assert merge_budgets(even, np.ones((3, 16), dtype=bool), 12).tolist() == [6, 4, 2]
    steep = np.stack([even[0], np.eye(16)[0], even[2]])
    assert merge_budgets(steep, np.ones((3, 16), dtype=bool), 12)[1] == 1


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_budgets_spend_all_slots_within_bounds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    merged = rng.random((5, 6)) > rng.random((5, 1))
    freq = rng.random((5, 6)) * (rng.random((5, 1)) > 0.3)  # a silent layer has variance 0
    least, most = int(merged.any(axis=1).sum()), int(merged.sum())
    slots = int(rng.integers(least, most + 4))
    for given_L in (merge_budgets(freq, merged, slots), uniform_budgets(merged, slots)):
        assert given_L.sum() == min(slots, most)
        assert ((given_L >= merged.any(axis=1)) & (given_L <= merged.sum(axis=1))).all()
    if least:
        with pytest.raises(ValueError, match=f"give at least {least}, or tune fewer"):
            merge_budgets(freq, merged, least - 1)


def test_uniform_is_uniform() -> None:
    assert uniform_budgets(np.ones((3, 8), dtype=bool), 8).tolist() == [3, 3, 2]


def test_eq2_by_loops() -> None:
    rng = np.random.default_rng(1)
    alias = np.array([[0, 1, 0, 1, 4], [0, 1, 1, 1, 4]])
    freq, attention = rng.random((2, 5)), rng.random((2, 5))
    freq[1, 1:4] = 0.0  # a cluster that nobody used
    shares = merge_shares(alias, freq, attention)
    stack = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    merge = Merge(alias, shares)
    assert merge.stored_LE.tolist() == [[True, True, False, False, True]] * 2
    for layer, clusters in enumerate([[[0, 2], [1, 3], [4]], [[0], [1, 2, 3], [4]]]):
        rows = merged_rows(stack, merge, layer)
        assert len(rows) == 3
        for row, members in zip(rows, clusters, strict=True):
            alpha = [freq[layer, e] * attention[layer, e] for e in members]
            if sum(alpha) == 0:
                alpha = [1.0] * len(members)
            expected = sum(a / sum(alpha) * stack[e] for a, e in zip(alpha, members, strict=True))
            assert torch.allclose(row, expected, atol=1e-14)
            assert shares[layer, members].sum() == pytest.approx(1.0)


def test_rerouting_adds_weights_that_land_on_one_expert() -> None:
    alias = torch.tensor([0, 1, 0, 1, 4])
    experts = torch.tensor([[2, 3, 0], [4, 1, 3], [3, -1, 1], [0, 1, 4]])
    weights = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.7, 0.0, 0.3], [0.4, 0.3, 0.3]], requires_grad=True)
    to, summed = reroute(experts, weights, alias)
    assert to.tolist() == [[0, 1, -1], [4, 1, -1], [1, -1, -1], [0, 1, 4]]
    expected = torch.tensor([[0.7, 0.3, 0.0], [0.6, 0.4, 0.0], [1.0, 0.0, 0.0], [0.4, 0.3, 0.3]])
    assert torch.allclose(summed, expected)
    summed.sum().backward()
    assert weights.grad is not None
    assert weights.grad.tolist() == [[1, 1, 1], [1, 1, 1], [1, 0, 1], [1, 1, 1]]


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_one_expert_per_cluster_equals_the_unmerged_model_exactly(top_k: int, dtype: torch.dtype) -> None:
    model = [tuple(part.to(dtype) for part in layer) for layer in draw_model(0, (0.0, 1.0))]
    x_TH = torch.randn(50, HIDDEN, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)
    true, freq_LE = forward(model, x_TH, top_k)
    merged_LE = np.arange(EXPERTS) % 3 > 0
    merged_LE = np.tile(merged_LE, (2, 1))
    budgets_L = merge_budgets(freq_LE, merged_LE, int(merged_LE.sum()))
    features = np.random.default_rng(0).standard_normal((2, EXPERTS, 4))
    features[:, 4] = features[:, 5]  # two experts that cannot be told apart
    merge = plan_merge(features, merged_LE, budgets_L, freq_LE=freq_LE, attention_LE=freq_LE + 1, seed=0)
    assert merge.stored_LE.all()
    assert torch.equal(forward(model, x_TH, top_k, merge)[0], true)
    for layer in range(2):
        assert torch.equal(merged_rows(model[layer][0], merge, layer), model[layer][0])


def test_error_is_below_uniform_and_below_one_per_layer_where_deep_layers_are_skewed() -> None:
    """Flux's claim, in its setting: the most used experts of a layer are tuned, deep layers are skewed."""
    errors = np.array([output_errors(seed, (0, 4, 8, 12), 2, 4) for seed in range(3)])
    assert (errors[:, 0] < 0.6 * errors[:, 1]).all()
    assert (errors[:, 1] < errors[:, 2]).all()


def test_without_tuned_experts_eq1_loses_to_uniform_at_top_four() -> None:
    """The other side: eq. 1 gives balanced shallow layers nearly all slots, and the deep ones pay."""
    errors = np.array([output_errors(seed, (0, 0, 0, 0), 4, 0) for seed in range(3)])
    assert (errors[:, 0] > errors[:, 1]).all()
    assert (errors[:, 0] < errors[:, 2]).all()


def test_tuned_experts_stand_for_themselves() -> None:
    features = np.ones((1, 4, 2))
    merged = np.array([[True, False, True, True]])
    merge = plan_merge(
        features, merged, np.array([1]), freq_LE=np.ones((1, 4)), attention_LE=np.array([[1.0, 9.0, 2.0, 1.0]]), seed=0
    )
    assert merge.alias_LE.tolist() == [[0, 1, 0, 0]]
    assert merge.weight_LE.tolist() == [[0.25, 1.0, 0.5, 0.25]]
