"""The backward of the routing kernels against autograd through the float64 reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from route_cases import RULES, cohort, draw, mask, relative
from torch import Tensor

from fedmoe_kernels import SlotMap, reference, route


def grads(logits_TE: Tensor, k: int, slot_map: SlotMap | None, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """dL/dlogits by the kernels and by the reference, for a random upstream gradient."""
    fast, slow = logits_TE.clone().requires_grad_(), logits_TE.double().requires_grad_()
    upstream_TK = draw(logits_TE.shape[0], k, seed=11)
    route(fast, k, permitted_E=slot_map, backend="triton", **kwargs).weights_TK.backward(upstream_TK)
    table = None if slot_map is None else slot_map.slot_of_expert
    truth = reference.route(slow, k, slot_of_expert=table, **kwargs).weights_TK
    if truth.requires_grad:
        truth.backward(upstream_TK.double())
    assert fast.grad is not None
    return fast.grad, torch.zeros_like(slow) if slow.grad is None else slow.grad


@pytest.mark.parametrize(("scoring", "renormalize"), RULES)
@pytest.mark.parametrize(("T", "E", "k"), [(0, 6, 2), (1, 6, 2), (37, 6, 3), (21, 8, 8), (33, 33, 1)])
def test_gradient_equals_the_reference(T, E, k, scoring, renormalize):
    permitted_E = torch.rand(E, generator=torch.Generator().manual_seed(T)) < 0.7
    permitted_E[E // 2] = True
    rule: dict[str, Any] = {"scoring": scoring, "renormalize": renormalize, "scale": 2.5}
    if scoring == "sigmoid":
        rule |= {"bias_E": draw(E, seed=3), "groups": (E, 1 + E // 2)}
    for slot_map in (SlotMap.build(permitted_E), None):
        got, truth = grads(draw(T, E, seed=1), k, slot_map, **rule)
        # One choice whose weight is renormalised has no slope; what float32 leaves of it is noise around 0.
        assert (got.double() - truth).norm() < 1e-5 * truth.norm() + 1e-6


@pytest.mark.parametrize(("scoring", "renormalize"), RULES)
def test_gradient_in_a_cohort_equals_the_reference_and_has_the_bits_of_each_client_alone(scoring, renormalize):
    slot_map, client_T = cohort(3, 7, 61)
    logits_TE, valid_T = draw(61, 7, seed=5), torch.rand(61, generator=torch.Generator().manual_seed(6)) < 0.8
    rule = {"scoring": scoring, "renormalize": renormalize, "valid_T": valid_T}
    got, truth = grads(logits_TE, 3, slot_map, client_T=client_T, **rule)
    assert relative(got, truth) < 1e-5
    assert not got[~valid_T].any()
    held_TE = (slot_map.slot_of_expert >= 0)[client_T]
    assert not got[~held_TE].any()
    for c in range(3):
        mine = client_T == c
        leaf = logits_TE[mine].requires_grad_()
        alone = SlotMap.build(slot_map.slot_of_expert[c] >= 0)
        rule_c = rule | {"valid_T": valid_T[mine], "backend": "triton"}
        route(leaf, 3, permitted_E=alone, **rule_c).weights_TK.backward(draw(61, 3, seed=11)[mine])
        assert torch.equal(leaf.grad, got[mine])


@pytest.mark.parametrize(("scoring", "renormalize"), RULES)
def test_gradient_is_zero_at_logits_that_are_not_finite_and_without_a_row(scoring, renormalize):
    nan, inf = math.nan, math.inf
    rows = [[nan] * 4, [nan, 1, 0, nan], [inf, 0, inf, 1], [-inf, -inf, 2, -inf], [nan, 2, -inf, 0.5]]
    logits_TE = torch.tensor(rows)
    for slot_map in (None, SlotMap.build(mask(1, 0, 1, 1))):
        got, truth = grads(logits_TE, 2, slot_map, scoring=scoring, renormalize=renormalize)
        assert got.isfinite().all()
        assert not got[~logits_TE.isfinite()].any()
        torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradient_has_the_dtype_of_the_logits(dtype):
    for scoring, renormalize in RULES:
        got, truth = grads(draw(29, 10, dtype=dtype), 3, None, scoring=scoring, renormalize=renormalize)
        assert got.dtype == dtype
        assert relative(got, truth) < (1e-3 if dtype == torch.float16 else 5e-3)


def test_expanded_gradients_and_transposed_logits():
    leaf_ET = draw(6, 5).requires_grad_()
    route(leaf_ET.t(), 2, renormalize=False, backend="triton").weights_TK.sum().backward()
    leaf_TE = leaf_ET.detach().t().contiguous().requires_grad_()
    route(leaf_TE, 2, renormalize=False, backend="torch").weights_TK.backward(torch.ones(5, 2))
    assert relative(leaf_ET.grad.t(), leaf_TE.grad) < 1e-5
