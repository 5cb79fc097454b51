"""Invariant 11: every bad update is refused with a reason, and leaves no trace in the sums nor in the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from update_cases import SHAPE_LE, clone_update, make_plan, make_specs, make_state, make_update

from fedmoe_core.messages.update import ClientUpdate
from fedmoe_core.model.spec import model_hash
from fedmoe_core.server.accumulator import Accumulator
from fedmoe_core.server.fixed_point import SumSettings
from fedmoe_core.server.means import dense_mean, expert_mean, gate_mean

NAN, INF = float("nan"), float("inf")
TRAINED = np.array([[1, 0, 1, 1, 0], [0, 1, 0, 0, 0]], dtype=bool)  # layer 1 has one row: the shape that broadcasts
Change = Callable[[ClientUpdate], ClientUpdate]


def with_delta(key: str, value: Any) -> Change:
    return lambda update: replace(update, deltas={**update.deltas, key: value})


def with_entry(key: str, value: float) -> Change:
    def change(update: ClientUpdate) -> ClientUpdate:
        delta = update.deltas[key].clone()
        delta.view(-1)[-1] = value
        return with_delta(key, delta)(update)

    return change


def with_weight(name: str, place: tuple[int, int], value: float) -> Change:
    def change(update: ClientUpdate) -> ClientUpdate:
        weight_LE = getattr(update, name).copy()
        weight_LE[place] = value
        return replace(update, **{name: weight_LE})

    return change


def with_profile(name: str, value: Any) -> Change:
    return lambda update: replace(update, profile=replace(update.profile, **{name: value}))


def without(key: str) -> Change:
    return lambda update: replace(update, deltas={k: v for k, v in update.deltas.items() if k != key})


def with_fields(**fields: Any) -> Change:
    return lambda update: replace(update, **fields)


BAD: dict[str, tuple[Change, str]] = {
    "nan in an expert": (with_entry("moe.0.w_in", NAN), "moe.0.w_in holds NaN or infinity"),
    "inf in an expert": (with_entry("moe.0.w_out", INF), "moe.0.w_out holds NaN or infinity"),
    "minus inf in a router": (with_entry("moe.1.router", -INF), "moe.1.router holds NaN or infinity"),
    "nan in a dense tensor": (with_entry("dense.head", NAN), "dense.head holds NaN or infinity"),
    "above the bound": (with_entry("moe.1.w_in", 1.5), "above value_bound 1"),
    "below minus the bound": (with_entry("moe.1.w_in", -1.5), "above value_bound 1"),
    "huge": (with_entry("moe.1.w_in", 3e38), "above value_bound 1"),
    "rows of all experts": (with_delta("moe.0.w_in", torch.zeros(5, 8, 3)), "has shape (5, 8, 3), not (3, 8, 3)"),
    "one row for three": (with_delta("moe.0.w_in", torch.zeros(1, 8, 3)), "has shape (1, 8, 3), not (3, 8, 3)"),
    "no row axis": (with_delta("moe.1.router", torch.zeros(3)), "has shape (3,), not (1, 3)"),
    "scalar": (with_delta("moe.1.router", torch.zeros(())), "has shape (), not (1, 3)"),
    "dense that broadcasts": (with_delta("dense.head", torch.zeros(1, 3)), "has shape (1, 3), not (7, 3)"),
    "scalar with an axis": (with_delta("dense.scale", torch.zeros(1)), "has shape (1,), not ()"),
    "same size, other shape": (with_delta("moe.0.w_in", torch.zeros(3, 3, 8)), "has shape (3, 3, 8)"),
    "float64": (with_delta("moe.0.w_in", torch.zeros(3, 8, 3).double()), "has dtype torch.float64, not torch.float32"),
    "float16": (with_delta("moe.0.w_in", torch.zeros(3, 8, 3).half()), "has dtype torch.float16"),
    "integers": (with_delta("moe.0.w_in", torch.zeros(3, 8, 3).long()), "has dtype torch.int64"),
    "sparse": (with_delta("moe.0.w_in", torch.zeros(3, 8, 3).to_sparse()), "not a dense tensor"),
    "meta": (with_delta("moe.0.w_in", torch.zeros(3, 8, 3, device="meta")), "not a dense tensor"),
    "numpy": (with_delta("moe.0.w_in", np.zeros((3, 8, 3), np.float32)), "not a dense tensor"),
    "unknown key": (with_delta("moe.7.w_in", torch.zeros(3, 8, 3)), "unknown key 'moe.7.w_in'"),
    "key of another type": (with_delta(3, torch.zeros(1)), "deltas has a key that is not a text"),  # type: ignore[arg-type]
    "missing expert": (without("moe.0.w_out"), "missing key 'moe.0.w_out'"),
    "missing router": (without("moe.1.router"), "missing key 'moe.1.router'"),
    "missing dense": (without("dense.norm"), "missing key 'dense.norm'"),
    "no deltas": (with_fields(deltas=None), "deltas is a NoneType"),
    "negative expert weight": (with_weight("expert_weight_LE", (0, 0), -0.1), "expert_weight_LE is negative (-0.1)"),
    "expert weight above 1": (with_weight("expert_weight_LE", (0, 0), 1.1), "expert_weight_LE is above 1 (1.1)"),
    "nan expert weight": (with_weight("expert_weight_LE", (0, 0), NAN), "expert_weight_LE holds NaN"),
    "weight on a frozen expert": (with_weight("expert_weight_LE", (0, 1), 0.5), "weight on layer 0 expert 1"),
    "negative router weight": (with_weight("router_weight_LE", (0, 0), -1e-9), "router_weight_LE is negative"),
    "router weight above 1": (with_weight("router_weight_LE", (1, 1), 2), "router_weight_LE is above 1"),
    "inf router weight": (with_weight("router_weight_LE", (1, 1), INF), "router_weight_LE holds NaN or infinity"),
    "router weight on a frozen row": (with_weight("router_weight_LE", (1, 4), 0.5), "weight on layer 1 expert 4"),
    "weights that broadcast": (with_fields(expert_weight_LE=np.ones((1, 5))), "expert_weight_LE has shape (1, 5)"),
    "weights in a list": (
        with_fields(router_weight_LE=[[0.0] * 5] * 2),
        "router_weight_LE is not a numpy array of float64",
    ),
    "weights as objects": (
        with_fields(router_weight_LE=np.full(SHAPE_LE, None)),
        "router_weight_LE is not a numpy array of float64",
    ),
    "nan gate weight": (with_fields(gate_weight=NAN), "gate_weight is not a finite number (it is nan)"),
    "negative gate weight": (with_fields(gate_weight=-0.5), "gate_weight is negative"),
    "gate weight above 1": (with_fields(gate_weight=1.5), "gate_weight is above 1"),
    "gate weight of no number": (with_fields(gate_weight="1"), "gate_weight is not a finite number (it is '1')"),
    "no samples": (with_fields(sample_weight=0.0), "sample_weight is 0"),
    "inf sample weight": (with_fields(sample_weight=INF), "sample_weight is not a finite number (it is inf)"),
    "other client": (with_fields(client=9), "is from client 9, not from client 0"),
    "other round": (with_fields(round=3), "is for round 3, not for round 0"),
    "failed": (with_fields(status="failed", error="loss is NaN at step 2"), "client failed: loss is NaN at step 2"),
    "unknown status": (with_fields(status="fine"), "status is 'fine', and a client says ok or failed"),
    "nan statistics": (with_profile("taylor_LE", np.full(SHAPE_LE, NAN)), "profile.taylor_LE holds NaN"),
    "statistics of another model": (
        with_profile("tokens_L", np.ones(3)),
        "profile.tokens_L is not an array of float64 of shape (2,)",
    ),
    "profile of no kind": (with_fields(profile="rows"), "profile is a str, not a ClientProfile"),
    "endless reason": (with_fields(status="failed", error="x" * 10**6), "client failed: xxx"),
}


@pytest.mark.parametrize("name", BAD)
def test_inv11_bad_update_is_refused_and_named(name: str) -> None:
    change, reason = BAD[name]
    plan, other = make_plan(TRAINED), make_plan(TRAINED, client=1)
    accumulator = Accumulator(make_specs(), train_dense=True)
    assert accumulator.add(make_update(other, train_dense=True), other).accepted
    before = accumulator.flatten()

    outcome = accumulator.add(change(make_update(plan, train_dense=True)), plan)

    assert not outcome.accepted
    assert reason in outcome.reason
    assert len(outcome.reason) <= 300
    assert (outcome.client, outcome.round) == (0, 0)
    assert torch.equal(accumulator.flatten(), before)


def test_inv11_the_same_update_unchanged_is_accepted() -> None:
    """The control of the table above: nothing but the change is at fault."""
    plan = make_plan(TRAINED)
    outcome = Accumulator(make_specs(), train_dense=True).add(make_update(plan, train_dense=True), plan)
    assert outcome.accepted
    assert outcome.reason == ""


def test_inv11_norm_bound_counts_all_tensors_together() -> None:
    """No tensor alone passes the bound, their joint norm does."""
    plan = make_plan(TRAINED)
    update = make_update(plan)
    norms = {key: float(delta.double().norm()) for key, delta in update.deltas.items()}
    joint = float(np.sqrt(sum(norm**2 for norm in norms.values())))
    tight = SumSettings(norm_bound=joint * (1 - 1e-6))
    assert max(norms.values()) < tight.norm_bound
    outcome = Accumulator(make_specs(), tight).add(update, plan)
    assert "is above norm_bound" in outcome.reason
    assert Accumulator(make_specs(), SumSettings(norm_bound=joint * (1 + 1e-6))).add(update, plan).accepted


def test_inv11_dense_keys_are_unknown_when_the_trunk_is_frozen() -> None:
    plan = make_plan(TRAINED)
    outcome = Accumulator(make_specs()).add(make_update(plan, train_dense=True), plan)
    assert "unknown key 'dense.scale'" in outcome.reason


def test_inv11_router_keys_are_unknown_when_the_router_is_frozen() -> None:
    plan = make_plan(TRAINED)
    update = make_update(plan)
    accumulator = Accumulator(make_specs(), train_router=False)
    assert "unknown key 'moe.0.router'" in accumulator.add(update, plan).reason
    deltas = {key: value for key, value in update.deltas.items() if not key.endswith("router")}
    assert accumulator.add(replace(update, deltas=deltas), plan).accepted


def test_inv11_layer_without_trainable_experts_sends_nothing() -> None:
    only_first = TRAINED & np.array([[True], [False]])
    plan = make_plan(only_first)
    update = make_update(plan)
    assert not any(key.startswith("moe.1") for key in update.deltas)
    assert Accumulator(make_specs()).add(update, plan).accepted
    extra = with_delta("moe.1.router", torch.zeros(0, 3))(update)
    assert "unknown key 'moe.1.router'" in Accumulator(make_specs()).add(extra, plan).reason


def test_inv11_gate_weight_needs_a_trained_row() -> None:
    plan = make_plan(np.zeros(SHAPE_LE, dtype=bool))
    update = make_update(plan)
    assert Accumulator(make_specs()).add(update, plan).accepted
    refused = Accumulator(make_specs()).add(replace(update, gate_weight=0.5), plan)
    assert "gate_weight is positive" in refused.reason


def test_inv11_half_precision_models_take_their_dtype_or_float32() -> None:
    plan = make_plan(TRAINED)
    for dtype, accepted in ((torch.bfloat16, True), (torch.float32, True), (torch.float16, False)):
        accumulator = Accumulator(make_specs(torch.bfloat16))
        assert accumulator.add(make_update(plan, dtype=dtype), plan).accepted is accepted, dtype


def test_inv11_hostile_object_is_refused_not_raised() -> None:
    class Trap:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError("boom")

    outcome = Accumulator(make_specs()).add(Trap(), make_plan(TRAINED))  # type: ignore[arg-type]
    assert outcome.reason == "is a Trap, not a ClientUpdate"


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_inv11_model_stays_finite_and_untouched_by_any_poison(data: st.DataObject) -> None:
    """One poisoned number anywhere in any client: that client is out, the rest give the model they give alone."""
    plans = [make_plan(TRAINED, client=c) for c in range(3)]
    updates = [make_update(plan, train_dense=True) for plan in plans]
    victim = data.draw(st.integers(0, 2))
    key = data.draw(st.sampled_from(sorted(updates[victim].deltas)))
    poison = data.draw(st.sampled_from([NAN, INF, -INF, 1.0001, -7.0, 3.4e38]))
    place = data.draw(st.integers(0, updates[victim].deltas[key].numel() - 1))
    poisoned = clone_update(updates[victim])
    poisoned.deltas[key].view(-1)[place] = poison

    state = make_state()
    model_digest = model_hash(state)
    accumulator, alone = (Accumulator(make_specs(), train_dense=True) for _ in range(2))
    for client, (update, plan) in enumerate(zip(updates, plans, strict=True)):
        outcome = accumulator.add(poisoned if client == victim else update, plan)
        assert outcome.accepted == (client != victim)
        if client != victim:
            alone.add(update, plan)
    sums = accumulator.sums()
    new = {**expert_mean(sums, state), **gate_mean(sums, state), **dense_mean(sums, state)}
    assert all(bool(torch.isfinite(tensor).all()) for tensor in new.values())
    assert torch.equal(accumulator.flatten(), alone.flatten())
    assert model_hash(state) == model_digest
