"""Energy as a budget: joules of operations and traffic by a device's power, kept by plans, experts and steps alike."""

from __future__ import annotations

import numpy as np
import pytest
from hand_made import TRAINED, model, plan_for, population

from fedmoe_core.algorithms.baselines import FedAvgSmallest
from fedmoe_core.budget.limits import Budget, BudgetError, Cost
from fedmoe_core.budget.rates import Power
from fedmoe_core.budget.resources import RESOURCES
from fedmoe_core.messages.plan import ExpertPlan
from fedmoe_core.server.planning import make_plan, plan_of_masks
from fedmoe_core.server.state import Population, initial_state

SCORES_LE = np.arange(1.0, 9.0).reshape(2, 4)
PI = Budget.parse("raspberry-pi-5-8gb").power
assert PI is not None


def facts(joules: float, *words: str) -> Population:
    return population(*words, budgets=(f"raspberry-pi-5-8gb,energy={joules!r}J",) * 3)


def planned(joules: float, *words: str) -> ExpertPlan:
    return make_plan(facts(joules, *words), initial_state(model(), 3), 0, SCORES_LE, explore_absent=False)


def test_energy_is_counted_from_operations_and_traffic() -> None:
    power = Power(joules_per_flop=2e-9, joules_per_byte=1e-6)
    budget = Budget(energy_joules=5.0, power=power)
    cost = Cost(flops=1e9, bytes_down=10**6, bytes_up=2 * 10**6, memory_bytes=10**9)
    assert RESOURCES["energy"].used(cost, budget) == 2.0 + 3.0
    assert budget.fits(cost)
    assert Budget(energy_joules=4.0, power=power).violations(cost) == ["energy: 5 J (5.0 J) used, 4 J (4.0 J) allowed"]
    assert budget.after(Cost(flops=1e9)).energy_joules == 3.0


def test_text_needs_a_device_and_reads_back() -> None:
    budget = Budget.parse("raspberry-pi-5-8gb,energy=2kJ,experts=8")
    assert (budget.energy_joules, budget.experts) == (2000.0, 8)
    assert Budget.parse(str(budget)) == budget
    with pytest.raises(ValueError, match="energy is counted by a device profile; write one before it"):
        Budget.parse("energy=5J")
    ledger = budget.record() | {"power": None}
    assert Budget.of(ledger).energy_joules == 2000.0
    assert Budget.of(ledger).violations(Cost(energy_joules=2001.0)) == [
        "energy: 2.01e+03 J (2001.0 J) used, 2e+03 J (2000.0 J) allowed"
    ]
    with pytest.raises(ValueError, match="'W' is not a unit of energy; valid: MJ, kJ, J"):
        Budget.parse("raspberry-pi-5-8gb,energy=5W")
    with pytest.raises(ValueError, match="'%' is not a unit of energy"):
        Budget.parse("raspberry-pi-5-8gb,energy=25%", spec_experts=8)


def test_inv1_every_plan_keeps_its_energy_and_more_energy_never_buys_less() -> None:
    words = ("train.local_steps=4",)
    unlimited = planned(1e6, *words)
    assert (unlimited.permitted_LE.all(), unlimited.local_steps) == (True, 4)
    whole = RESOURCES["energy"].used(unlimited.predicted, unlimited.budget)
    with pytest.raises(BudgetError, match=r"energy budget .* cannot hold one expert per MoE layer"):
        planned(0.1 * whole, *words)
    held, steps = [], []
    for share in (0.6, 0.75, 0.9, 0.99, 1.01):
        plan = planned(share * whole, *words)
        assert RESOURCES["energy"].used(plan.predicted, plan.budget) <= share * whole
        held.append(int(plan.permitted_LE.sum()))
        steps.append(plan.local_steps)
    assert held == sorted(held)
    assert held[0] < held[-1] == 8, "no limit bound the experts"
    assert steps[-1] == 4


def test_masks_of_an_algorithm_are_bound_by_steps_and_refused_by_name() -> None:
    plenty = facts(1e6, "train.local_steps=4")
    state = initial_state(model(), 3)
    plan = plan_of_masks(plenty, state, 0, TRAINED[0])
    assert plan.local_steps == 4
    step = plan.predicted.flops / 4 * PI.joules_per_flop
    whole = RESOURCES["energy"].used(plan.predicted, plan.budget)
    fewer = plan_of_masks(facts(whole - 1.5 * step, "train.local_steps=4"), state, 0, TRAINED[0])
    assert fewer.local_steps == 2
    with pytest.raises(ValueError, match="what the budget's energy or operations allow"):
        plan_of_masks(facts(whole - 3.9 * step, "train.local_steps=4"), state, 0, TRAINED[0])


def test_the_smallest_of_all_budgets_counts_energy() -> None:
    whole = RESOURCES["energy"].used(planned(1e6).predicted, planned(1e6).budget)
    tiers = ("unlimited", f"raspberry-pi-5-8gb,energy={0.8 * whole!r}J", "unlimited")
    held_LE = FedAvgSmallest(population(budgets=tiers)).experts()
    assert held_LE.sum() < 8


def test_a_plan_without_an_energy_limit_is_what_it_was() -> None:
    assert Budget.parse("raspberry-pi-5-8gb").energy_joules is None
    assert plan_for(0).budget == Budget()
