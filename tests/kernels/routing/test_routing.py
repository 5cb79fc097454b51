"""Routing against the loops of reference.py and against its own promises: the mask, the record, the statistics."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedmoe_kernels import reference
from fedmoe_kernels.routing.record import Routing, SlotMap
from fedmoe_kernels.routing.route import route
from fedmoe_kernels.routing.stats import RouterStats

RULES: list[tuple[str, Any]] = [
    ("softmax", True),
    ("softmax", False),
    ("topk_softmax", True),
    ("sigmoid", True),
    ("sigmoid", False),
    ("softmax", "share"),
    ("topk_softmax", "share"),
]
INDEX_FIELDS = ("experts_TK", "slots_TK", "rows_TK", "tokens_R", "places_R", "offsets_B1")
STATS_FIELDS = tuple(field.name for field in fields(RouterStats))


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def mask(*bits: int) -> Tensor:
    return torch.tensor(bits, dtype=torch.bool)


@dataclass(frozen=True)
class Case:
    """One drawn call; `kwargs` fits both `route` and `reference.route` but for the mask."""

    logits_TE: Tensor
    k: int
    permitted_E: Tensor
    kwargs: dict[str, Any]


@st.composite
def cases(draw_from: st.DrawFn, *, odd_values: bool = True, groups: bool = True) -> Case:
    """Sizes from empty to a few tokens; coarse logits make ties, and NaN and infinities are strewn in."""
    generator = torch.Generator().manual_seed(draw_from(st.integers(0, 2**31)))
    T, E = draw_from(st.integers(0, 7)), draw_from(st.integers(1, 9))
    scoring, renormalize = draw_from(st.sampled_from(RULES))
    logits_TE = 2 * torch.randn(T, E, dtype=torch.float64, generator=generator)
    if draw_from(st.booleans()):
        logits_TE = logits_TE.round()
    if odd_values and draw_from(st.booleans()):
        kind_TE = torch.randint(0, 8, (T, E), generator=generator)
        for kind, value in enumerate((math.nan, math.inf, -math.inf)):
            logits_TE = logits_TE.masked_fill(kind_TE == kind, value)
    permitted_E = torch.rand(E, generator=generator) < draw_from(st.sampled_from((0.2, 0.6, 1.0)))
    permitted_E[int(torch.randint(E, (), generator=generator))] = True
    kwargs: dict[str, Any] = {"scoring": scoring, "renormalize": renormalize}
    kwargs["scale"] = draw_from(st.sampled_from((1.0, 2.5, 0.0)))
    if draw_from(st.booleans()):
        kwargs["valid_T"] = torch.rand(T, generator=generator) < 0.7
    if scoring == "sigmoid" and draw_from(st.booleans()):
        kwargs["bias_E"] = torch.randn(E, dtype=torch.float64, generator=generator).round()
    if scoring == "sigmoid" and groups and draw_from(st.booleans()):
        n_group = draw_from(st.sampled_from([g for g in range(1, E + 1) if E % g == 0]))
        kwargs["groups"] = (n_group, draw_from(st.integers(1, n_group)))
    k = draw_from(st.integers(1, E))
    if renormalize == "share":
        kwargs["of"] = draw_from(st.sampled_from((None, k, k + 2)))
        kwargs["temperature"] = draw_from(st.sampled_from((1.0, 0.5, 64.0)))
    return Case(logits_TE, k, permitted_E, kwargs)


def assert_same(got: Routing, truth: Any, *, tol: float = 1e-12) -> None:
    for name in INDEX_FIELDS:
        assert torch.equal(getattr(got, name), getattr(truth, name)), name
    torch.testing.assert_close(got.weights_TK, truth.weights_TK, rtol=tol, atol=tol)


def assert_same_stats(got: RouterStats, truth: dict[str, Tensor] | RouterStats) -> None:
    for name in STATS_FIELDS:
        expected = truth[name] if isinstance(truth, dict) else getattr(truth, name)
        torch.testing.assert_close(
            getattr(got, name), expected, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


@settings(max_examples=200, deadline=None)
@given(cases())
def test_route_equals_the_reference(case):
    slot_map = SlotMap.build(case.permitted_E)
    truth = reference.route(case.logits_TE, case.k, slot_of_expert=slot_map.slot_of_expert, **case.kwargs)
    got = route(case.logits_TE, case.k, permitted_E=slot_map, with_stats=True, **case.kwargs)
    assert_same(got, truth)
    assert_same_stats(got.stats, truth.stats)
    assert got.counts_B.tolist() == truth.offsets_B1.diff().tolist()


@settings(max_examples=100, deadline=None)
@given(cases(), st.integers(0, 2**31))
def test_route_gradient_equals_the_reference_and_is_never_nan(case, seed):
    upstream_TK = draw(case.logits_TE.shape[0], case.k, seed=seed)
    slot_map = SlotMap.build(case.permitted_E)
    fast, slow = (case.logits_TE.clone().requires_grad_() for _ in range(2))
    route(fast, case.k, permitted_E=slot_map, **case.kwargs).weights_TK.backward(upstream_TK)
    truth = reference.route(slow, case.k, slot_of_expert=slot_map.slot_of_expert, **case.kwargs).weights_TK
    if truth.requires_grad:
        truth.backward(upstream_TK)
    expected = torch.zeros_like(slow) if slow.grad is None else slow.grad
    torch.testing.assert_close(fast.grad, expected, rtol=1e-10, atol=1e-12)


@settings(max_examples=150, deadline=None)
@given(cases(groups=False))
def test_inv3_masked_routing_equals_submodel(case):
    """Dense routing of the logits' permitted columns, ids and bias renamed, gives the same choices and weights."""
    kept = case.permitted_E.nonzero().flatten()
    sub_kwargs = case.kwargs | ({"bias_E": case.kwargs["bias_E"][kept]} if "bias_E" in case.kwargs else {})
    k = min(case.k, kept.numel())
    if case.kwargs["renormalize"] == "share":  # the sub-model's own k does not change what was k of the whole
        sub_kwargs["of"] = case.kwargs["of"] or case.k
    masked = route(case.logits_TE, case.k, permitted_E=case.permitted_E, **case.kwargs)
    sub = route(case.logits_TE[:, kept].contiguous(), k, **sub_kwargs)
    renamed_TK = torch.where(sub.experts_TK >= 0, kept[sub.experts_TK], -1)
    assert torch.equal(masked.experts_TK[:, :k], renamed_TK)
    assert torch.equal(masked.slots_TK[:, :k], sub.slots_TK)
    assert torch.equal(masked.offsets_B1, sub.offsets_B1)
    torch.testing.assert_close(masked.weights_TK[:, :k], sub.weights_TK, rtol=1e-12, atol=1e-12)
    assert (masked.experts_TK[:, k:] == -1).all()
    assert (masked.weights_TK[:, k:] == 0).all()


@pytest.mark.parametrize(("scoring", "renormalize"), RULES)
def test_inv3_no_absent_expert_gets_a_row_or_a_gradient(scoring, renormalize):
    permitted_E = mask(1, 0, 0, 1, 0, 1, 1, 0)
    logits_TE = draw(64, 8).requires_grad_()
    bias_E = torch.tensor([0.0, 9.0] * 4) if scoring == "sigmoid" else None  # the bias asks for absent ones
    routing = route(logits_TE, 3, permitted_E=permitted_E, scoring=scoring, renormalize=renormalize, bias_E=bias_E)
    routing.weights_TK.backward(draw(64, 3, seed=1))
    assert permitted_E[routing.experts_TK].all()
    assert int(routing.offsets_B1[-1]) == 64 * 3
    assert not logits_TE.grad[:, ~permitted_E].any()
    assert logits_TE.grad[:, permitted_E].any()


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**31))
def test_inv7_kl_terms_sum_to_mutual_information(T, E, seed):
    """HFedMoE eq. 11: KL_e = (1/T) sum_i G_e log G_e - p_e log p_e; their sum is I(routed expert; token)."""
    logits_TE = 3 * draw(T, E, seed=seed)
    stats = route(logits_TE, 1, with_stats=True).stats
    p_E = stats.prob_sum_E / stats.tokens
    kl_E = stats.plogp_sum_E / stats.tokens - torch.xlogy(p_E, p_E)
    joint_TE = logits_TE.softmax(-1) / T
    independent_TE = joint_TE.sum(0) * joint_TE.sum(1, keepdim=True)
    information = (joint_TE * (joint_TE / independent_TE).log()).sum()
    torch.testing.assert_close(kl_E.sum(), information, rtol=1e-10, atol=1e-12)
    assert (kl_E >= -1e-12).all()


@settings(max_examples=60, deadline=None)
@given(cases())
def test_the_record_is_a_stable_permutation(case):
    routing = route(case.logits_TE, case.k, permitted_E=case.permitted_E, **case.kwargs)
    real = int(routing.offsets_B1[-1])
    places, slots_R = routing.places_R[:real], routing.slots_TK.flatten()
    assert torch.equal(places.sort().values, (slots_R >= 0).nonzero().flatten())
    assert torch.equal(routing.rows_TK.flatten()[places], torch.arange(real))
    assert torch.equal(routing.tokens_R[:real], places // case.k)
    key = slots_R[places] * (slots_R.numel() + 1) + places  # slot, then token, then choice
    assert (key.diff() > 0).all()
    assert (routing.places_R[real:] == -1).all()
    assert (routing.tokens_R[real:] == -1).all()
    assert torch.equal(routing.counts_B, torch.bincount(slots_R[places], minlength=routing.num_slots))


@pytest.mark.parametrize(("scoring", "renormalize"), RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ties_go_to_the_lowest_index(scoring, renormalize, dtype):
    """A sigmoid of a vector's tail may round otherwise than of its body: 2001 * 6 leaves a tail for every width."""
    logits_TE = (draw(2001, 1).expand(2001, 6) * torch.tensor([1, 1, 1, 1, 1, 1.0])).to(dtype)
    bias_E = torch.zeros(6) if scoring == "sigmoid" else None
    routing = route(logits_TE, 3, permitted_E=mask(0, 1, 1, 0, 1, 1), scoring=scoring, bias_E=bias_E)
    assert (routing.experts_TK == torch.tensor([1, 2, 4])).all()


@pytest.mark.parametrize(("scoring", "renormalize"), RULES)
def test_nan_and_infinite_logits_are_defined(scoring, renormalize):
    nan, inf = math.nan, math.inf
    rows = [[nan, nan, nan, nan], [nan, 1, 0, nan], [inf, 0, inf, 1], [-inf, -inf, 2, -inf], [-inf] * 4]
    logits_TE = torch.tensor(rows, requires_grad=True)
    routing = route(logits_TE, 2, scoring=scoring, renormalize=renormalize, with_stats=True)
    routing.weights_TK.sum().backward()
    assert routing.experts_TK.tolist() == [[-1, -1], [1, 2], [0, 2], [2, -1], [-1, -1]]
    assert routing.weights_TK.isfinite().all()
    assert (routing.weights_TK[routing.experts_TK < 0] == 0).all()
    assert logits_TE.grad.isfinite().all()
    assert (logits_TE.grad[~logits_TE.isfinite()] == 0).all()
    assert float(routing.stats.tokens) == 3
    assert all(getattr(routing.stats, name).isfinite().all() for name in STATS_FIELDS)


@pytest.mark.parametrize(("scoring", "renormalize"), RULES)
def test_a_token_whose_permitted_experts_are_all_nan_gets_no_row_and_no_gradient(scoring, renormalize):
    """The absent expert 1 has a finite logit: a softmax over an empty set must not leak NaN into its gradient."""
    logits_TE = torch.tensor([[math.nan, 2.0, -math.inf], [1.0, 2.0, 0.0]], requires_grad=True)
    rule = {"scoring": scoring, "renormalize": renormalize, "with_stats": True}
    routing = route(logits_TE, 2, permitted_E=mask(1, 0, 1), **rule)
    routing.weights_TK.sum().backward()
    assert routing.experts_TK.tolist() == [[-1, -1], [0, 2]]
    assert routing.weights_TK[0].tolist() == [0, 0]
    assert logits_TE.grad[0].tolist() == [0, 0, 0]
    assert float(routing.stats.tokens) == 2


def test_underflowing_scores_still_route():
    """exp(-200) and sigmoid(-200) are 0 in float32; renormalised softmax must not divide by that 0."""
    logits_TE = torch.tensor([[0.0, -200.0, -201.0, -202.0]])
    permitted_E = mask(0, 1, 1, 1)
    for scoring in ("softmax", "topk_softmax"):
        routing = route(logits_TE, 2, permitted_E=permitted_E, scoring=scoring)
        torch.testing.assert_close(routing.weights_TK, torch.tensor([[1.0, 0.0]]).softmax(-1))
    routing = route(logits_TE, 2, permitted_E=permitted_E, scoring="sigmoid")
    assert routing.weights_TK.isfinite().all()


@pytest.mark.parametrize("T", [0, 1])
@pytest.mark.parametrize(("scoring", "renormalize"), RULES)
def test_no_token_and_one_token(T, scoring, renormalize):
    logits_TE = draw(T, 5).requires_grad_()
    routing = route(logits_TE, 2, scoring=scoring, renormalize=renormalize, with_stats=True)
    routing.weights_TK.sum().backward()
    assert routing.weights_TK.shape == routing.rows_TK.shape == (T, 2)
    assert routing.tokens_R.shape == (2 * T,)
    assert int(routing.offsets_B1[-1]) == 2 * T
    assert float(routing.stats.tokens) == T
    assert logits_TE.grad.shape == (T, 5)


def test_fewer_permitted_than_k_leaves_empty_places():
    routing = route(draw(6, 5), 4, permitted_E=mask(0, 1, 0, 1, 0))
    assert routing.weights_TK.shape == (6, 4)
    assert (routing.experts_TK[:, :2] >= 0).all()
    assert (routing.experts_TK[:, 2:] == -1).all()
    torch.testing.assert_close(routing.weights_TK[:, :2].sum(-1), torch.ones(6, dtype=torch.float64))
    assert int(routing.offsets_B1[-1]) == 12


@pytest.mark.parametrize(("scoring", "renormalize"), RULES)
def test_padding_changes_nothing_for_the_others(scoring, renormalize):
    logits_TE, valid_T, rule = draw(9, 6), mask(1, 0, 1, 1, 0, 0, 1, 1, 0), {"scoring": scoring}
    rule["renormalize"] = renormalize
    padded_TE = logits_TE.masked_fill(~valid_T[:, None], math.nan).requires_grad_()
    padded = route(padded_TE, 2, permitted_E=mask(1, 1, 0, 1, 1, 1), valid_T=valid_T, with_stats=True, **rule)
    alone = route(logits_TE[valid_T], 2, permitted_E=mask(1, 1, 0, 1, 1, 1), with_stats=True, **rule)
    assert torch.equal(padded.weights_TK[valid_T], alone.weights_TK)
    assert torch.equal(padded.rows_TK[valid_T], alone.rows_TK)
    assert torch.equal(padded.offsets_B1, alone.offsets_B1)
    assert (padded.slots_TK[~valid_T] == -1).all()
    assert_same_stats(padded.stats, alone.stats)
    padded.weights_TK.backward(draw(9, 2, seed=1))
    assert not padded_TE.grad[~valid_T].any()


@pytest.mark.parametrize(("scoring", "renormalize"), RULES)
def test_a_cohort_equals_its_clients_one_by_one(scoring, renormalize):
    permitted_CE = torch.stack([mask(1, 0, 1, 1, 0), mask(1, 1, 1, 1, 1), mask(0, 0, 0, 1, 0)])
    trainable_CE = torch.stack([mask(0, 0, 1, 0, 0), mask(1, 0, 0, 1, 0), mask(0, 0, 0, 1, 0)])
    cohort = SlotMap.build(permitted_CE, trainable_CE)
    logits_TE, client_T = draw(40, 5), torch.randint(3, (40,), generator=torch.Generator().manual_seed(3))
    rule = {"scoring": scoring, "renormalize": renormalize, "with_stats": True}
    both = route(logits_TE, 2, permitted_E=cohort, client_T=client_T, **rule)
    truth = reference.route(
        logits_TE, 2, slot_of_expert=cohort.slot_of_expert, client_T=client_T, scoring=scoring, renormalize=renormalize
    )
    assert_same(both, truth)
    assert_same_stats(both.stats, truth.stats)
    for c in range(3):
        mine = client_T == c
        alone = route(logits_TE[mine], 2, permitted_E=permitted_CE[c], **rule)
        assert torch.equal(both.weights_TK[mine], alone.weights_TK)
        assert torch.equal(both.experts_TK[mine], alone.experts_TK)
        chosen = alone.experts_TK >= 0
        assert torch.equal(both.slots_TK[mine][chosen], cohort.slot_of_expert[c][alone.experts_TK[chosen]])
        assert_same_stats(RouterStats(*(getattr(both.stats, name)[c] for name in STATS_FIELDS)), alone.stats)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_from_topk_equals_routes_own_record(case):
    slot_map = SlotMap.build(case.permitted_E)
    own = route(case.logits_TE, case.k, permitted_E=slot_map, **case.kwargs)
    assert_same(Routing.from_topk(own.experts_TK, own.weights_TK, slot_map), own, tol=0)


def test_from_topk_drops_what_is_not_here():
    """Ids -1, 5 and 99 do not exist, expert 1 is absent; even a NaN weight there must not reach a gradient."""
    experts_TK = torch.tensor([[0, 1], [5, 2], [-1, 99], [2, 2]], dtype=torch.int32)
    weights_TK = torch.tensor([[1, math.nan], [2, 3], [4, 5], [6, 7]], dtype=torch.bfloat16, requires_grad=True)
    slot_map = SlotMap.build(mask(1, 0, 1, 1, 1))
    routing = Routing.from_topk(experts_TK, weights_TK, slot_map, valid_T=mask(1, 1, 1, 0))
    routing.weights_TK.backward(torch.ones(4, 2))
    assert routing.experts_TK.tolist() == [[0, -1], [-1, 2], [-1, -1], [-1, -1]]
    assert routing.slots_TK.tolist() == [[0, -1], [-1, 1], [-1, -1], [-1, -1]]
    assert routing.weights_TK.tolist() == [[1, 0], [0, 3], [0, 0], [0, 0]]
    assert routing.weights_TK.dtype == torch.float32
    assert weights_TK.grad.tolist() == [[1, 0], [0, 1], [0, 0], [0, 0]]
    assert routing.counts_B.tolist() == [1, 1, 0, 0]


def test_statistics_add_over_micro_batches():
    logits_TE, permitted_E = draw(30, 6), mask(1, 0, 1, 0, 1, 1)
    parts = [route(part, 2, permitted_E=permitted_E, with_stats=True).stats for part in logits_TE.split(7)]
    whole = route(logits_TE, 2, permitted_E=permitted_E, with_stats=True).stats
    assert_same_stats(sum(parts, RouterStats.zeros(6)), whole)
    assert not RouterStats.zeros(6, num_clients=2).hits_E.any()
    assert RouterStats.zeros(6, num_clients=2).hits_E.shape == (2, 6)


def test_statistics_are_detached_float64_sums_over_the_unmasked_softmax():
    logits_TE = draw(500, 8, dtype=torch.float32).requires_grad_()
    permitted_E = mask(1, 0, 1, 0, 0, 0, 1, 0)
    per_rule = [
        route(logits_TE, 2, permitted_E=permitted_E, scoring=scoring, renormalize=renormalize, with_stats=True).stats
        for scoring, renormalize in RULES
    ]
    prob_TE = logits_TE.detach().double().softmax(-1)
    for stats in per_rule:
        assert all(getattr(stats, name).dtype == torch.float64 for name in STATS_FIELDS)
        assert not any(getattr(stats, name).requires_grad for name in STATS_FIELDS)
        torch.testing.assert_close(stats.prob_sum_E, prob_TE.sum(0), rtol=1e-6, atol=0)
        torch.testing.assert_close(stats.lost_mass, prob_TE[:, ~permitted_E].sum(), rtol=1e-6, atol=0)
        assert torch.equal(stats.hits_E, torch.bincount(logits_TE.topk(2).indices.flatten(), minlength=8).double())


def test_no_statistics_unless_asked_for():
    assert route(draw(3, 4), 2).stats is None


@pytest.mark.parametrize(("held", "k", "sums_to"), [(8, 4, 1.0), (4, 4, 1.0), (3, 4, 0.75), (1, 4, 0.25), (8, 2, 0.5)])
def test_share_leaves_out_what_cannot_be_chosen(held, k, sums_to):
    """Every weight of k' < k choices stays near 1 / 4; renormalised, one of them would be four times as large."""
    logits_TE, permitted_E = draw(6, 8), torch.arange(8) < held
    routing = route(logits_TE, k, permitted_E=permitted_E, renormalize="share", of=4)
    torch.testing.assert_close(routing.weights_TK.sum(1), torch.full((6,), sums_to, dtype=torch.float64))
    equal = route(logits_TE, k, permitted_E=permitted_E, renormalize="share", of=4, temperature=1e6).weights_TK
    assert torch.equal((equal > 0).sum(1), torch.full((6,), min(held, k)))
    torch.testing.assert_close(equal[equal > 0], torch.full_like(equal[equal > 0], 0.25), rtol=1e-5, atol=0)


def test_share_chooses_and_counts_as_softmax_does():
    logits_TE, permitted_E = draw(9, 8), mask(1, 0, 1, 1, 0, 0, 1, 0)
    usual = route(logits_TE, 3, permitted_E=permitted_E, with_stats=True)
    share = route(logits_TE, 3, permitted_E=permitted_E, renormalize="share", temperature=32.0, with_stats=True)
    for name in INDEX_FIELDS:
        assert torch.equal(getattr(usual, name), getattr(share, name)), name
    for name in STATS_FIELDS:
        assert torch.equal(getattr(usual.stats, name), getattr(share.stats, name)), name
    plain = route(logits_TE, 3, permitted_E=permitted_E, renormalize="share")
    torch.testing.assert_close(plain.weights_TK, usual.weights_TK, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"renormalize": "shares"}, "renormalize='shares' is unknown; use True, False or 'share'"),
        ({"renormalize": "share", "scoring": "sigmoid"}, "weighs by a softmax; use scoring='softmax'"),
        ({"renormalize": "share", "of": 1}, "of=1 is below k=2; .* give at least 2"),
        ({"renormalize": "share", "temperature": 0.0}, "temperature=0.0 is out of range; give a positive number"),
        ({"of": 4}, "belong to renormalize='share', not to True; leave them out"),
        ({"renormalize": False, "temperature": 2.0}, "belong to renormalize='share', not to False; leave them out"),
    ],
)
def test_what_does_not_go_with_share_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        route(draw(3, 4), 2, **options)
