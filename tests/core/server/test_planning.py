"""Plans from masks and scores: what is served, what is paid beside training, and what a budget refuses."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from hand_made import EVERY_LE, EXPERTS, HELD, LAYERS, TRAINED, mask, model, population

from fedmoe_core.budget.limits import Budget, Cost
from fedmoe_core.messages.plan import ExpertPlan, Extras
from fedmoe_core.server.planning import make_plan, plan_everything, plan_of_masks
from fedmoe_core.server.state import Population, initial_state

STATE = initial_state(model(), 3)
SCORES_LE = np.arange(LAYERS * EXPERTS, dtype=float).reshape(LAYERS, EXPERTS) + 1
NOBODY = np.full((LAYERS, EXPERTS), -1)


def planned(facts: Population | None = None, client: int = 0, **words: Any) -> ExpertPlan:
    extras = Extras(**{field.name: words.pop(field.name) for field in fields(Extras) if field.name in words})
    return plan_of_masks(facts or population(), STATE, client, HELD[client], TRAINED[client], extras=extras, **words)


def test_the_masks_are_taken_as_they_are_and_costed() -> None:
    facts = population(budgets=("experts=4",) * 3)
    plan = planned(facts)
    np.testing.assert_array_equal(plan.permitted_LE, HELD[0])
    np.testing.assert_array_equal(plan.trainable_LE, TRAINED[0])
    assert plan.predicted == facts.costs.predict(HELD[0], TRAINED[0], local_steps=plan.local_steps)
    assert plan.budget == facts.budgets[0]
    assert plan.extras.surcharge == Cost()


def test_make_plan_is_plan_of_masks_of_the_best_experts() -> None:
    facts = population("selection.explore=0", budgets=("experts=3",) * 3)
    plan = make_plan(facts, STATE, 1, SCORES_LE)
    chosen_LE = mask("...x", "..xx")
    again = plan_of_masks(facts, STATE, 1, chosen_LE, scores_LE=SCORES_LE)
    np.testing.assert_array_equal(plan.permitted_LE, chosen_LE)
    assert (plan.predicted, plan.seed, plan.top_k) == (again.predicted, again.seed, again.top_k)


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ("experts=3", r"client 0: the plan exceeds its budget \(experts: 4 experts used, 3 experts allowed\)"),
        ("down=1KiB", r"client 0: the plan exceeds its budget \(down: .* used, 1.00 KiB"),
        ("flops=10", "client 0: flops budget 10 cannot pay one local step"),
    ],
)
def test_inv1_masks_over_the_budget_are_refused_with_client_need_and_limit(budget: str, said: str) -> None:
    facts = population(budgets=(budget,) * 3)
    with pytest.raises(ValueError, match=said):
        planned(facts)
    assert planned(facts, budgeted=False).budget == Budget()


def test_inv1_flops_are_met_by_steps_then_k_then_the_share_within_the_masks() -> None:
    facts = population("train.local_steps=4")
    step = facts.costs.step_flops(HELD[0], TRAINED[0])
    fewer = planned(population("train.local_steps=4", budgets=(f"flops={2.5 * step}",) * 3))
    assert (fewer.local_steps, fewer.top_k) == (2, 2)
    one = facts.costs.step_flops(HELD[0], TRAINED[0], top_k=1)
    less = planned(population("train.local_steps=4", budgets=(f"flops={1.2 * one}",) * 3), scores_LE=SCORES_LE)
    assert (less.local_steps, less.top_k) == (1, 1)
    assert planned(facts, top_k=1, local_steps=3).top_k == 1
    assert planned(facts, top_k=1, local_steps=3).local_steps == 3


def test_a_surcharge_is_predicted_and_leaves_less_for_training() -> None:
    facts = population("train.local_steps=4")
    step = facts.costs.step_flops(HELD[0], TRAINED[0])
    extra = Cost(memory_bytes=10**9, flops=2 * step, bytes_down=7, bytes_up=5, experts=8)
    bare, paid = planned(facts), planned(facts, surcharge=extra)
    assert paid.predicted == bare.predicted.with_extra(extra)
    assert paid.predicted.memory_bytes == 10**9  # before or after training, so the larger peak counts
    assert paid.predicted.flops == bare.predicted.flops + 2 * step
    assert paid.predicted.experts == 8
    tight = population("train.local_steps=4", budgets=(f"flops={4.5 * step}",) * 3)
    assert planned(tight).local_steps == 4
    assert planned(tight, surcharge=Cost(flops=2 * step)).local_steps == 2
    with pytest.raises(ValueError, match=r"client 0: the work besides training alone exceeds .*flops"):
        planned(tight, surcharge=Cost(flops=5 * step))


def test_a_surcharge_in_bytes_leaves_fewer_experts_to_make_plan() -> None:
    facts = population("selection.explore=0")
    down = facts.costs.bytes_down(mask("...x", "..xx"))
    tight = population("selection.explore=0", budgets=(f"down={down}",) * 3)
    assert make_plan(tight, STATE, 0, SCORES_LE).permitted_LE.sum() == 3
    assert make_plan(tight, STATE, 0, SCORES_LE, extras=Extras(surcharge=Cost(bytes_down=1))).permitted_LE.sum() == 2


def test_validation_is_charged_to_those_who_validate() -> None:
    facts = replace(population(), validation_tokens_C=np.array([64, 128, 0]))
    bare, paid = planned(facts), planned(facts, validate=True)
    spent = facts.costs.forward_flops(HELD[0], tokens=64, top_k=bare.top_k)
    assert paid.extras.surcharge.flops == spent > 0
    assert paid.predicted.flops == bare.predicted.flops + spent
    assert paid.predicted.bytes_up == bare.predicted.bytes_up + facts.costs.profile_bytes + 24
    with pytest.raises(ValueError, match="needs_validation"):
        planned(validate=True)


def test_served_experts_may_be_chosen_and_cost_rows_not_memory() -> None:
    facts = population()
    held_LE = mask("x...", "x...")
    alias_LE = np.where(held_LE, -1, 0)
    alone, serving = (
        plan_of_masks(facts, STATE, 0, held_LE, extras=Extras(alias_LE=alias)) for alias in (None, alias_LE)
    )
    assert (alone.top_k, serving.top_k) == (1, 2)
    np.testing.assert_array_equal(serving.served_LE, EVERY_LE)
    np.testing.assert_array_equal(serving.taught_LE, EVERY_LE)
    assert serving.predicted.memory_bytes == facts.costs.memory(held_LE, held_LE, top_k=2)
    assert serving.predicted.flops == serving.local_steps * facts.costs.step_flops(EVERY_LE, EVERY_LE)
    extras = Extras(alias_LE=np.tile([-1, -1, 1, 1], (2, 1)))
    frozen = plan_of_masks(facts, STATE, 0, mask("xx..", "xx.."), held_LE, extras=extras)
    np.testing.assert_array_equal(frozen.taught_LE, held_LE)  # those that the frozen expert serves teach nobody
    np.testing.assert_array_equal(Extras().taught(held_LE), held_LE)


@pytest.mark.parametrize(
    ("alias", "said"),
    [
        ((0, 1, 2), "served by expert 2, which is not permitted"),
        ((0, 1, 4), "served by expert 4, which is not permitted"),
        ((0, 0, 1), "expert 0 of layer 0 is permitted and served"),
    ],
)
def test_an_alias_that_nobody_serves_is_refused(alias: tuple[int, int, int], said: str) -> None:
    alias_LE = NOBODY.copy()
    alias_LE[alias[:2]] = alias[2]
    held_LE = mask("xx..", "xx..") if alias[1] == 0 else mask("x...", "xx..")
    with pytest.raises(ValueError, match=said):
        plan_of_masks(population(), STATE, 0, held_LE, extras=Extras(alias_LE=alias_LE))


def test_an_alias_of_another_shape_or_kind_is_refused() -> None:
    for alias in (NOBODY[:1], NOBODY.astype(float)):
        with pytest.raises(ValueError, match="whole numbers of shape"):
            replace(planned(), extras=Extras(alias_LE=alias))
    with pytest.raises(ValueError, match="only the router and"):
        planned(keeps=frozenset({"dense"}))


def test_a_gate_that_stays_is_neither_sent_nor_received() -> None:
    facts = population()
    bare, own = planned(facts), planned(facts, keeps=frozenset({"router"}))
    size = torch.float64.itemsize
    assert bare.predicted.bytes_down - own.predicted.bytes_down == LAYERS * EXPERTS * 3 * size
    assert bare.predicted.bytes_up - own.predicted.bytes_up == TRAINED[0].sum() * 3 * size
    assert bare.predicted.memory_bytes == own.predicted.memory_bytes


def test_inv1_everything_is_planned_whatever_the_budget_says() -> None:
    plan = plan_everything(population(budgets=("experts=2",) * 3), STATE, 1)
    assert plan.permitted_LE.all()
    assert plan.trainable_LE.all()
    assert plan.budget == Budget()


def test_extra_work_adds_up_but_peaks_do_not() -> None:
    one, two = Cost(5, 1.0, 10, 20, 3, 0.5), Cost(4, 2.0, 1, 2, 4, 0.25)
    assert one.with_extra(two) == Cost(5, 3.0, 11, 22, 4, 0.75)
    assert one.with_extra(Cost()) == one
    budget = Budget(memory_bytes=9, flops=8.0, bytes_down=7, bytes_up=6, experts=5, name="tier")
    assert budget.after(two) == Budget(9, 6.0, 6, 4, 5)
    assert Budget().after(two) == Budget()
    with pytest.raises(ValueError, match="raise the budget"):
        budget.after(Cost(bytes_up=7))
