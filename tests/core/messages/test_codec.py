"""Updates as JSON: everything but the deltas comes back bit for bit, private tensors of any dtype included."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hand_made import plan_for, population, profiles, result_for
from update_cases import ALL, make_plan, make_profile, make_specs, make_update

from fedmoe_core.algorithms.hfedmoe import HFedMoE
from fedmoe_core.messages.codec import report_of, update_of
from fedmoe_core.messages.plan import Extras
from fedmoe_core.messages.profile import profile_arrays
from fedmoe_core.messages.update import ClientUpdate, Weights, finished_update, refused
from fedmoe_core.model.spec import Evaluation
from fedmoe_core.server.admission import expected_shapes, refusal
from fedmoe_core.server.fixed_point import SumSettings

PRIVATE = {
    "gate": torch.tensor([[0.1, -0.0], [float("inf"), float("nan")]]),
    "half": torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "mask": torch.tensor([True, False]),
    "count": torch.tensor(7),
    "nothing": torch.zeros(0, 4, dtype=torch.float64),
    "slice": torch.arange(12.0).view(3, 4)[:, 1],
}


def full_update() -> ClientUpdate:
    update = HFedMoE(population()).answer(plan_for(0), result_for(0))
    return replace(
        update,
        private=PRIVATE,
        metrics={"scale": 0.1, "norm": 1e-300},
        validation=Evaluation(1.0 / 3.0, 7, 2),
        validation_profile=profiles()[1],
    )


def test_inv10_a_report_brings_everything_back_bit_for_bit() -> None:
    update = full_update()
    back = update_of(json.loads(json.dumps(report_of(update))))
    assert back.deltas == {}
    assert (back.metrics, back.validation, back.cost) == (update.metrics, update.validation, update.cost)
    assert set(back.private) == set(PRIVATE)
    for name, tensor in PRIVATE.items():
        found = back.private[name]
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape), name
        same = found.reshape(-1).view(torch.uint8), tensor.contiguous().reshape(-1).view(torch.uint8)
        assert torch.equal(*same), name
    for mine, theirs in ((update.profile, back.profile), (update.validation_profile, back.validation_profile)):
        assert mine is not None
        assert theirs is not None
        for name, array in profile_arrays(mine).items():
            np.testing.assert_array_equal(getattr(theirs, name), array)
    assert update_of(report_of(replace(update, profile=None, validation=None))).validation is None


def test_a_refused_update_leaves_nothing_to_remember() -> None:
    gone = refused(full_update(), plan_for(0), "over budget")
    assert (gone.private, gone.metrics, gone.validation, gone.validation_profile) == ({}, {}, None, None)
    assert gone.cost == full_update().cost


def test_private_tensors_are_copies_and_metrics_are_plain_numbers() -> None:
    gate, zeros_LE = torch.ones(2), np.zeros(plan_for(0).trainable_LE.shape)
    weights = Weights(zeros_LE, zeros_LE, private={"gate": gate}, metrics={"n": 3})
    update = finished_update(plan_for(0), result_for(0), weights, samples=1, sample_weight=1.0)
    gate.zero_()
    assert torch.equal(update.private["gate"], torch.ones(2))
    assert update.metrics == {"n": 3.0}
    assert type(update.metrics["n"]) is float


BAD = {
    "private nan": (dict(private={"g": torch.tensor([float("nan")])}), "private 'g' holds NaN"),
    "private list": (dict(private={"g": [1.0]}), "private 'g' is not a dense tensor"),
    "private sparse": (dict(private={"g": torch.eye(2).to_sparse()}), "private 'g' is not a dense tensor"),
    "metric inf": (dict(metrics={"m": float("inf")}), "metric 'm' is not a finite number (it is inf)"),
    "metric text": (dict(metrics={"m": "1"}), "metric 'm' is not a finite number (it is '1')"),
    "validation nan": (
        dict(validation=Evaluation(float("nan"), 3)),
        "validation.loss_sum is not a finite number (it is nan)",
    ),
    "validation of nothing": (dict(validation=Evaluation(1.0, 0)), "validation does not count its predictions"),
    "validation profile": (
        dict(validation_profile=replace(make_profile(ALL), hits_LE=np.ones((1, 1)))),
        "validation_profile.hits_LE is not",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_inv11_what_an_algorithm_would_remember_is_checked_too(name: str) -> None:
    fields, said = BAD[name]
    plan = make_plan(ALL)
    reason = refusal(replace(make_update(plan, train_dense=True), **fields), plan, make_specs(), SumSettings())
    assert reason is not None
    assert said in reason


def test_inv11_a_gate_that_stays_on_the_client_is_not_expected_and_has_no_weight() -> None:
    plan = replace(make_plan(ALL), extras=Extras(keeps=frozenset({"router"})))
    assert not [key for key in expected_shapes(make_specs(), plan) if key.endswith("router")]
    update = make_update(plan, train_dense=True)
    without = {key: delta for key, delta in update.deltas.items() if not key.endswith("router")}
    weighted = replace(update, deltas=without)
    assert "stays on the client" in str(refusal(weighted, plan, make_specs(), SumSettings()))
    unweighted = replace(weighted, gate_weight=0.0, router_weight_LE=np.zeros(ALL.shape))
    assert refusal(unweighted, plan, make_specs(), SumSettings()) is None
    sent = replace(unweighted, deltas=update.deltas)
    assert "unknown key 'moe.0.router'" in str(refusal(sent, plan, make_specs(), SumSettings()))
