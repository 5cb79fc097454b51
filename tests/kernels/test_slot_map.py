"""The slot map's numbering, and the one clear sentence that routing gives for every argument that does not fit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedmoe_kernels.routing.record import Routing, SlotMap
from fedmoe_kernels.routing.route import route


def mask(*bits: int) -> Tensor:
    return torch.tensor(bits, dtype=torch.bool)


def test_slot_map_numbers_trainable_first_then_frozen():
    slot_map = SlotMap.build(mask(1, 1, 0, 1, 1), mask(0, 1, 0, 0, 1))
    assert slot_map.slot_of_expert.tolist() == [2, 0, -1, 3, 1]
    assert slot_map.expert_of_slot_B.tolist() == [1, 4, 0, 3]
    cohort = SlotMap.build(torch.stack([mask(1, 1, 0), mask(0, 1, 1)]), torch.stack([mask(0, 1, 0), mask(0, 0, 1)]))
    assert cohort.slot_of_expert.tolist() == [[2, 0, -1], [-1, 3, 1]]
    assert cohort.expert_of_slot_B.tolist() == [1, 2, 0, 1]
    assert cohort.client_of_slot_B.tolist() == [0, 1, 0, 1]
    assert (cohort.num_slots, cohort.num_experts, cohort.num_clients) == (4, 3, 2)


@pytest.mark.parametrize(
    ("table", "num_slots", "said"),
    [
        ([0, 0, -1], 2, "exactly once"),  # a slot twice
        ([0, 2, -1], 2, "exactly once"),  # a gap
        ([0, 1, -1], 3, "exactly once"),  # a slot that nobody holds
        ([-1, -1], 0, "no permitted expert"),
        ([[0, 1], [-1, -1]], 2, "no permitted expert"),
        ([0.0, 1.0], 2, "int64"),
    ],
)
def test_a_slot_map_is_a_bijection(table, num_slots, said):
    with pytest.raises(ValueError, match=said):
        SlotMap(torch.tensor(table), num_slots)


@pytest.mark.parametrize(
    ("permitted_E", "trainable_E", "said"),
    [
        (mask(1, 0, 1), mask(1, 1, 0), "subset"),
        (mask(0, 0, 0), None, "permit at least one"),
        (mask(1, 0, 1), mask(1, 0), "one shape"),
        (torch.tensor([1, 0, 1]), None, "bool"),
    ],
)
def test_slot_map_build_refuses(permitted_E, trainable_E, said):
    with pytest.raises(ValueError, match=said):
        SlotMap.build(permitted_E, trainable_E)


COHORT = SlotMap.build(torch.ones(2, 4, dtype=torch.bool))


@pytest.mark.parametrize(
    ("k", "kwargs", "said"),
    [
        (5, {}, "k=5 does not fit 4 experts; choose k between 1 and 4"),
        (0, {}, "k=0 does not fit"),
        (2, {"scoring": "gumbel"}, "choose one of softmax"),
        (2, {"bias_E": torch.zeros(4)}, "belong to scoring='sigmoid'"),
        (2, {"scoring": "sigmoid", "bias_E": torch.zeros(3)}, "one number per expert"),
        (2, {"scoring": "sigmoid", "groups": (3, 1)}, "n_group must divide 4"),
        (2, {"scoring": "sigmoid", "groups": (2, 3)}, "topk_group lie in"),
        (2, {"permitted_E": mask(1, 1, 1)}, "covers 3 experts"),
        (2, {"valid_T": torch.ones(2, dtype=torch.bool)}, "valid_T"),
        (2, {"permitted_E": COHORT}, "give both or neither"),
        (2, {"client_T": torch.zeros(3, dtype=torch.int64)}, "give both or neither"),
        (2, {"permitted_E": COHORT, "client_T": torch.tensor([0, 1, 2])}, "client_T holds 2"),
        (2, {"permitted_E": COHORT, "client_T": torch.tensor([0, -1, 1])}, "client_T holds -1"),
    ],
)
def test_route_refuses_what_does_not_fit(k, kwargs, said):
    with pytest.raises(ValueError, match=said):
        route(torch.zeros(3, 4), k, **kwargs)


def test_route_refuses_integer_logits_and_from_topk_refuses_mismatched_shapes():
    with pytest.raises(ValueError, match="floating point"):
        route(torch.ones(3, 4, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match="both must be"):
        Routing.from_topk(torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 1), SlotMap.build(mask(1, 1)))


def test_a_shared_map_serves_absent_experts_by_held_ones():
    shared = SlotMap.shared(mask(1, 0, 0, 1, 1), mask(0, 0, 0, 0, 1), alias_E=torch.tensor([-1, 4, -1, -1, 4]))
    assert shared.slot_of_expert.tolist() == [1, 0, -1, 2, 0]
    assert shared.expert_of_slot_B.tolist() == [4, 0, 3]
    assert (shared.num_slots, shared.num_experts) == (3, 5)
    moved = shared.to("cpu")
    assert moved.expert_of_slot_B.tolist() == [4, 0, 3]
    nothing = SlotMap.shared(mask(1, 0, 1), alias_E=torch.full((3,), -1))
    assert nothing.slot_of_expert.tolist() == SlotMap.build(mask(1, 0, 1)).slot_of_expert.tolist()


def test_a_shared_map_of_a_cohort_stays_within_each_client():
    permitted = torch.stack([mask(1, 1, 0), mask(0, 0, 1)])
    trainable = torch.stack([mask(0, 1, 0), mask(0, 0, 1)])
    shared = SlotMap.shared(permitted, trainable, alias_E=torch.tensor([[-1, -1, 1], [2, 2, -1]]))
    assert shared.slot_of_expert.tolist() == [[2, 0, 0], [1, 1, 1]]
    assert shared.expert_of_slot_B.tolist() == [1, 2, 0]
    assert shared.client_of_slot_B.tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("alias", "said"),
    [
        ([-1, 2, -1], "does not hold"),  # 2 is absent as well
        ([-1, 5, -1], "does not hold"),
        ([-1, 1, -1], "does not hold"),  # itself, but absent
        ([1, -1, -1], "permitted expert to another"),
        ([-1.0, 0.0, -1.0], "int64"),
        ([-1, 0], "int64"),
    ],
)
def test_a_shared_map_refuses_an_alias_that_nobody_serves(alias, said):
    with pytest.raises(ValueError, match=said):
        SlotMap.shared(mask(1, 0, 0), alias_E=torch.tensor(alias))


@pytest.mark.parametrize(
    ("table", "owners"), [([0, 1, 2], [0, 1]), ([0, 0, -1], [0, 1]), ([0, 1, -1], [1, 0]), ([0, 1, 1], [0])]
)
def test_owners_must_lie_on_their_own_slots(table, owners):
    with pytest.raises(ValueError, match="owners"):
        SlotMap(torch.tensor(table), 2, owner_B=torch.tensor(owners))


@pytest.mark.parametrize("scoring", ["softmax", "topk_softmax", "sigmoid"])
def test_two_choices_on_one_slot_are_two_rows_whose_weights_add_up(scoring):
    logits_TE = torch.randn(9, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = route(logits_TE, 3, scoring=scoring, with_stats=True)
    alias_E = torch.tensor([-1, 0, 0, -1, 3])
    shared = route(
        logits_TE, 3, permitted_E=SlotMap.shared(mask(1, 0, 0, 1, 0), alias_E=alias_E), scoring=scoring, with_stats=True
    )
    # Every expert is held or served, so the choice and the weights are those of the whole layer.
    assert torch.equal(shared.experts_TK, whole.experts_TK)
    assert torch.equal(shared.weights_TK, whole.weights_TK)
    assert shared.slots_TK.tolist() == torch.tensor([0, 0, 0, 1, 1])[whole.experts_TK].tolist()
    assert int(shared.offsets_B1[-1]) == 27
    assert bool((shared.counts_B > 9).any())  # more rows than tokens
    assert float(shared.stats.lost_mass) == 0
    assert torch.equal(shared.stats.hits_E, whole.stats.hits_E)
    for place, row in enumerate(shared.rows_TK.flatten().tolist()):
        assert int(shared.places_R[row]) == place


def test_rows_per_slot_rides_from_the_plan_to_the_routing():
    one = SlotMap.build(torch.tensor([True, False, True]), rows_per_slot=40)
    assert one.to("cpu").rows_per_slot == 40
    logits = torch.randn(4, 3)
    assert route(logits, 2, permitted_E=one).rows_per_slot == 40
    assert Routing.from_topk(torch.zeros(4, 1).long(), torch.ones(4, 1), one).rows_per_slot == 40
    assert route(logits, 2).rows_per_slot is None  # from each call's own shapes


def test_tiles_of_a_cohort_never_come_from_its_rows():
    cohort = SlotMap.build(torch.ones(2, 3, dtype=torch.bool))
    found = [
        route(torch.randn(T, 3), 2, permitted_E=cohort, client_T=torch.zeros(T).long()).rows_per_slot for T in (4, 400)
    ]
    assert found == [256, 256]
    planned = SlotMap.build(torch.ones(2, 3, dtype=torch.bool), rows_per_slot=8)
    assert route(torch.randn(4, 3), 2, permitted_E=planned, client_T=torch.zeros(4).long()).rows_per_slot == 8
