"""The routing kernels in Triton's interpreter against the loops of reference.py, and against their own promises."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from route_cases import (
    INDEX_FIELDS,
    RULES,
    STATS_FIELDS,
    assert_counted,
    assert_routed,
    assert_same_bits,
    cohort,
    draw,
    mask,
    relative,
)
from torch import Tensor

from fedmoe_kernels import RouterStats, Routing, SlotMap, reference, route
from fedmoe_kernels.routing.ops import place_rows_op, route_backward_op, route_op


def check(logits_TE: Tensor, k: int, slot_map: SlotMap | None, **kwargs: Any) -> Routing:
    """Route by the kernels, with statistics, and compare every field and every statistic."""
    table = None if slot_map is None else slot_map.slot_of_expert
    truth = reference.route(logits_TE.double(), k, slot_of_expert=table, **kwargs)
    got = route(logits_TE, k, permitted_E=slot_map, with_stats=True, backend="triton", **kwargs)
    assert_routed(got, truth)
    assert_counted(got.stats, truth.stats)
    return got


@pytest.mark.parametrize(("scoring", "renormalize"), RULES)
@pytest.mark.parametrize(
    ("T", "E", "k"),
    [
        (0, 6, 2),  # nobody
        (1, 6, 2),
        (37, 6, 3),  # neither axis is a power of two, and k is not either
        (19, 1, 1),  # one expert
        (21, 8, 8),  # everything is chosen
        (33, 33, 1),  # 64 columns for 33 experts; a switch layer
    ],
)
def test_every_field_equals_the_reference(T, E, k, scoring, renormalize):
    permitted_E = torch.rand(E, generator=torch.Generator().manual_seed(T)) < 0.7
    permitted_E[E // 2] = True
    rule = {"scoring": scoring, "renormalize": renormalize, "scale": 2.5}
    # Multiples of 1/64: logits 1e-6 apart may have one sigmoid in float32, which then is a tie, and two in float64.
    check((128 * draw(T, E, seed=1)).round() / 64, k, SlotMap.build(permitted_E), **rule)
    check((128 * draw(T, E, seed=2)).round() / 64, k, None, **rule)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(
    ("E", "k", "groups"),
    [
        (12, 4, (4, 2)),
        (12, 5, (3, 1)),  # groups of 4 hold fewer than the 5 choices: the rest come from the others
        (6, 3, (6, 2)),  # groups of one expert, whose score is that expert's
        (10, 2, (5, 5)),  # all groups: as if there were none
        (6, 6, (2, 1)),
    ],
)
def test_sigmoid_with_bias_and_groups(E, k, groups, renormalize):
    permitted_E = torch.rand(E, generator=torch.Generator().manual_seed(k)) < 0.6
    permitted_E[0] = True
    rule = {"scoring": "sigmoid", "renormalize": renormalize, "bias_E": draw(E, seed=3), "groups": groups}
    check(draw(23, E, seed=1), k, SlotMap.build(permitted_E), **rule)
    check(draw(23, E, seed=2), k, None, **rule)


def test_a_bias_that_is_not_finite_is_defined():
    bias_E = torch.tensor([0.0, math.nan, -math.inf, math.inf, 0.5])
    got = check(draw(9, 5), 4, None, scoring="sigmoid", bias_E=bias_E)
    assert (got.experts_TK[:, 0] == 3).all()
    assert (got.experts_TK[:, 3] == -1).all()  # two experts can never be chosen


@pytest.mark.parametrize(("scoring", "renormalize"), RULES)
def test_nan_and_infinite_logits_are_defined(scoring, renormalize):
    """Also a token without any logit above -inf, one whose permitted logits are all NaN, and padding made of NaN."""
    nan, inf = math.nan, math.inf
    rows = [[nan] * 4, [nan, 1, 0, nan], [inf, 0, inf, 1], [-inf, -inf, 2, -inf], [-inf] * 4, [1, nan, 2, -inf]]
    logits_TE, rule = torch.tensor([*rows, [nan] * 4, [1.0] * 4]), {"scoring": scoring, "renormalize": renormalize}
    valid_T = mask(1, 1, 1, 1, 1, 1, 0, 0)
    got = check(logits_TE, 2, None, valid_T=valid_T, **rule)
    assert got.experts_TK.tolist()[:5] == [[-1, -1], [1, 2], [0, 2], [2, -1], [-1, -1]]
    check(logits_TE, 3, SlotMap.build(mask(0, 1, 0, 1)), valid_T=valid_T, **rule)


@pytest.mark.parametrize(("scoring", "renormalize"), RULES)
def test_ties_go_to_the_lowest_id(scoring, renormalize):
    logits_TE = draw(31, 9, seed=4).round()
    rule = {"scoring": scoring, "renormalize": renormalize}
    check(logits_TE, 4, SlotMap.build(mask(1, 1, 0, 1, 1, 1, 0, 1, 1)), **rule)
    same = route(draw(5, 1).expand(5, 6), 3, scoring=scoring, renormalize=renormalize, backend="triton")
    assert (same.experts_TK == torch.tensor([0, 1, 2])).all()


@pytest.mark.parametrize(("scoring", "renormalize"), RULES)
def test_fewer_permitted_than_k_leaves_empty_places(scoring, renormalize):
    permitted_E = mask(0, 1, 0, 1, 0)
    got = check(draw(17, 5), 4, SlotMap.build(permitted_E), scoring=scoring, renormalize=renormalize)
    assert (got.experts_TK[:, 2:] == -1).all()


@pytest.mark.parametrize(("scoring", "renormalize"), RULES)
def test_a_cohort_equals_the_reference_and_each_client_alone_bit_by_bit(scoring, renormalize):
    """Interleaved tokens with padding; what a client gets must not depend on who shares the call."""
    slot_map, client_T = cohort(3, 7, 61)
    logits_TE, valid_T = 2 * draw(61, 7, seed=5), torch.rand(61, generator=torch.Generator().manual_seed(6)) < 0.8
    rule: dict[str, Any] = {"scoring": scoring, "renormalize": renormalize}
    if scoring == "sigmoid":
        rule["bias_E"] = draw(7, seed=7)
    both = check(logits_TE, 3, slot_map, client_T=client_T, valid_T=valid_T, **rule)
    for c in range(3):
        mine, table_E = client_T == c, slot_map.slot_of_expert[c]
        alone = check(logits_TE[mine], 3, SlotMap.build(table_E >= 0), valid_T=valid_T[mine], **rule)
        assert torch.equal(both.weights_TK[mine], alone.weights_TK)
        assert torch.equal(both.experts_TK[mine], alone.experts_TK)
        for name in STATS_FIELDS:
            assert torch.equal(getattr(both.stats, name)[c], getattr(alone.stats, name)), name


def test_many_blocks_of_a_cohort_and_of_one_client():
    """300 tokens are 3 blocks of the routing kernel and 5 of the statistics; the truth is the torch body here."""
    slot_map, client_T = cohort(2, 6, 300)
    for kwargs in ({"permitted_E": slot_map, "client_T": client_T}, {}):
        calls = [(draw(300, 6), "triton"), (draw(300, 6), "triton"), (draw(300, 6, dtype=torch.float64), "torch")]
        got, again, truth = (route(z, 2, with_stats=True, backend=by, **kwargs) for z, by in calls)
        assert_routed(got, truth)
        assert_counted(got.stats, truth.stats)
        assert_same_bits(got, again)


def test_one_client_in_many_blocks_has_the_bits_that_it_has_alone():
    """The client's tokens lie spread over the blocks of a cohort of 300; alone they fill one block."""
    slot_map, client_T = cohort(3, 6, 300, seed=8)
    logits_TE, mine = 3 * draw(300, 6), client_T == 1
    rule = {"scoring": "softmax", "renormalize": False, "with_stats": True, "backend": "triton"}
    both = route(logits_TE, 2, permitted_E=slot_map, client_T=client_T, **rule)
    alone = route(logits_TE[mine], 2, permitted_E=SlotMap.build(slot_map.slot_of_expert[1] >= 0), **rule)
    assert torch.equal(both.weights_TK[mine], alone.weights_TK)
    assert all(torch.equal(getattr(both.stats, name)[1], getattr(alone.stats, name)) for name in STATS_FIELDS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_logits_compute_in_float32(dtype):
    logits_TE = draw(29, 10, dtype=dtype)
    for scoring, renormalize in RULES:
        check(logits_TE, 3, None, scoring=scoring, renormalize=renormalize)


def test_strided_inputs_are_read_as_what_they_mean():
    logits_ET, valid_2T, client_2T = draw(5, 14), torch.arange(28) % 3 > 0, torch.arange(28) % 2
    slot_map, _ = cohort(2, 5, 1)
    check(logits_ET.t(), 2, slot_map, client_T=client_2T[::2], valid_T=valid_2T[::2])
    check(logits_ET.t(), 2, None, scoring="sigmoid", bias_E=draw(10)[::2])


def test_the_limits_of_the_kernels_are_refused_by_name():
    wide = draw(2, 20)
    with pytest.raises(ValueError, match=r"k=17 .*1\.\.16"):
        route(wide, 17, backend="triton")
    with pytest.raises(ValueError, match=r"logits_TE is torch\.float64"):
        route(wide.double(), 2, backend="triton")
    with pytest.raises(ValueError, match="4097 experts"):
        route(draw(1, 4097), 2, backend="triton")
    with pytest.raises(ValueError, match="covers 3 experts"):
        route(wide, 2, permitted_E=mask(1, 1, 0), backend="triton")
    whole = SlotMap.build(torch.ones(20, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"k=17 .*1\.\.16"):
        Routing.from_topk(torch.zeros(2, 17, dtype=torch.int64), torch.ones(2, 17), whole, backend="triton")
    assert route(wide, 17).weights_TK.shape == (2, 17)  # the torch body on a CPU, without a word


@pytest.mark.parametrize(("case", "scoring", "renormalize"), [("cohort", "softmax", False), ("plain", "sigmoid", True)])
def test_opcheck(case, scoring, renormalize):
    slot_map, client_T = cohort(2, 6, 9)
    table_CE, who = torch.arange(6)[None], (None, None)
    if case == "cohort":
        table_CE, who = slot_map.slot_of_expert, (client_T, torch.arange(9) % 4 > 0)
    slots = int((table_CE >= 0).sum())
    bias_E = draw(6, seed=2) if scoring == "sigmoid" else None
    groups = (3, 2) if scoring == "sigmoid" else (1, 1)
    args = (draw(9, 6).requires_grad_(), table_CE, *who, bias_E, slots, 2, scoring, renormalize, *groups, 1.5, True)
    torch.library.opcheck(route_op, (*args, "triton"))
    experts_TK = torch.tensor([[0, 2], [4, -1], [-1, -1], [3, 0], [1, 4], [0, 1], [5, 2], [2, 3], [7, 1]])
    torch.library.opcheck(place_rows_op, (experts_TK, table_CE, *who, slots, "triton"))
    kept_TK = experts_TK.where(experts_TK < 6, -1)
    grad = (draw(9, 2), draw(9, 6), kept_TK, table_CE, who[0], scoring, renormalize, 1.5, "triton")
    torch.library.opcheck(route_backward_op, grad)


def test_compiles_as_one_graph():
    slot_map, client_T = cohort(2, 6, 11)

    def forward(logits_TE: Tensor, client_T: Tensor) -> tuple[Routing, Routing]:
        rule = {"permitted_E": slot_map, "client_T": client_T, "backend": "triton"}
        own = route(logits_TE, 2, with_stats=True, **rule)
        placed = Routing.from_topk(own.experts_TK, own.weights_TK, slot_map, client_T=client_T, backend="triton")
        return own, placed

    eager_TE, compiled_TE = (draw(11, 6).requires_grad_() for _ in range(2))
    eager = forward(eager_TE, client_T)
    compiled = torch.compile(forward, backend="aot_eager", fullgraph=True)(compiled_TE, client_T)
    for own, placed in (eager, compiled):
        own.weights_TK.backward(draw(11, 2, seed=1), retain_graph=True)
        for name in INDEX_FIELDS:
            assert torch.equal(getattr(own, name), getattr(placed, name)), name
    assert_same_bits(eager[0], compiled[0])
    assert torch.equal(eager_TE.grad, compiled_TE.grad)
    assert eager_TE.grad.any()


def test_statistics_of_parts_add_up_to_those_of_the_whole_exactly():
    """Sums of fixed-point terms know no order: cut anywhere, they are the same bits."""
    logits_TE = 2 * draw(90, 5, seed=9)
    whole = route(logits_TE, 2, with_stats=True, backend="triton").stats
    parts = RouterStats.zeros(5)
    for part_TE in logits_TE.split([1, 40, 49]):
        stats = route(part_TE, 2, with_stats=True, backend="triton").stats
        assert stats is not None
        parts = parts + stats
    assert all(torch.equal(getattr(whole, name), getattr(parts, name)) for name in STATS_FIELDS)


def test_extreme_logits_keep_every_statistic_accurate():
    """Probabilities from 1 down to exp(-80), of which exp(-26) is the last that a fixed-point term resolves."""
    logits_TE = torch.linspace(-80.0, 0.0, 33)[None].expand(3, 33).contiguous()
    got = route(logits_TE, 2, with_stats=True, backend="triton").stats
    truth = reference.route(logits_TE.double(), 2).stats
    for name in ("prob_sum_E", "plogp_sum_E"):
        assert (getattr(got, name) - truth[name]).abs().max() < 1e-6, name
        small = truth["prob_sum_E"] < 1e-3
        assert relative(getattr(got, name)[small], truth[name][small]) < 1e-6, name
