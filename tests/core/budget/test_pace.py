"""Time as a resource: virtual seconds of traffic and operations by a device's pace, kept by plans like any limit."""

from __future__ import annotations

import numpy as np
import pytest
from hand_made import model, population

from fedmoe_core.algorithms.baselines import FedAvgSmallest
from fedmoe_core.budget.devices import COMPUTE_SHARE, DEVICES
from fedmoe_core.budget.limits import Budget, BudgetError, Cost
from fedmoe_core.budget.rates import Pace, Seconds
from fedmoe_core.budget.resources import RESOURCES
from fedmoe_core.messages.plan import ExpertPlan
from fedmoe_core.server.planning import make_plan
from fedmoe_core.server.state import initial_state

SCORES_LE = np.arange(1.0, 9.0).reshape(2, 4)
RATES = "speed=2e6,downlink=80kbit,uplink=40kbit"


def planned(tier: str) -> ExpertPlan:
    facts = population("train.local_steps=4", budgets=(tier,) * 3)
    return make_plan(facts, initial_state(model(), 3), 0, SCORES_LE, explore_absent=False)


def seconds(plan: ExpertPlan) -> float:
    return RESOURCES["time"].used(plan.predicted, plan.budget)


def test_a_round_takes_its_bytes_and_operations_by_their_rates() -> None:
    pace = Pace(flops=2e9, down=8e6, up=1e6)
    cost = Cost(flops=8e9, bytes_down=2_000_000, bytes_up=500_000)
    assert pace.seconds(cost) == Seconds(down=2.0, compute=4.0, up=4.0)
    budget = Budget(virtual_seconds=9.5, pace=pace)
    assert RESOURCES["time"].used(cost, budget) == 10.0
    assert budget.violations(cost) == ["time: 10 s (10.0 s) used, 9.5 s (9.5 s) allowed"]
    assert budget.after(Cost(flops=2e9)).virtual_seconds == 8.5


def test_what_states_no_rate_takes_no_time_and_no_pace_is_not_known() -> None:
    assert Pace(up=8.0).seconds(Cost(flops=1e9, bytes_down=10, bytes_up=3)) == (0.0, 0.0, 3.0)
    assert Budget.parse("experts=8").record_of(Cost(flops=1.0))["virtual_seconds"] is None
    with pytest.raises(ValueError, match=r"speed=0\.0 is not a rate"):
        Pace(flops=0.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("time=3s", "time is counted by a device's speed and links; write them too"),
        ("speed=0", "a speed of 0 ends no round"),
        ("uplink=5MB", "'MB' is not a unit of uplink; did you mean 'Mbit'"),
        ("sped=3", "did you mean 'speed'"),
        ("speed=1e9,speed=1e9", "speed is given twice"),
        ("phone-8gb,time=25%", "'%' is not a unit of time"),
    ],
)
def test_a_bad_rate_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Budget.parse(text)


def test_rates_read_back_and_replace_those_of_a_profile() -> None:
    budget = Budget.parse("memory=40MiB,speed=2GFLOP,downlink=20Mbit,uplink=5Mbit,time=1min")
    assert budget.pace == Pace(2e9, 20e6, 5e6)
    assert budget.virtual_seconds == 60.0
    assert Budget.parse(str(budget)) == budget
    phone = Budget.parse("phone-8gb,uplink=1Mbit")
    assert phone.pace == Pace(1e12 * COMPUTE_SHARE, 100e6, 1e6)
    assert Budget.parse(str(phone)) == phone


def test_every_profile_has_a_pace_and_the_tiny_ones_no_limit_of_flops() -> None:
    for device in DEVICES:
        budget = Budget.parse(device.name)
        assert budget.pace is not None
        assert None not in (budget.pace.flops, budget.pace.down, budget.pace.up)
        assert (budget.flops is None) == device.name.startswith("tiny")


def test_inv1_every_plan_keeps_its_time_and_more_time_never_buys_less() -> None:
    unlimited = planned(RATES)
    assert (unlimited.permitted_LE.all(), unlimited.local_steps) == (True, 4)
    whole = seconds(unlimited)
    with pytest.raises(BudgetError, match=r"time budget .* s cannot hold one expert per MoE layer; at least .* s is"):
        planned(f"{RATES},time={0.05 * whole!r}")
    work = []
    for share in (0.5, 0.7, 0.9, 0.99, 1.001):
        plan = planned(f"{RATES},time={share * whole!r}")
        assert seconds(plan) <= share * whole
        work.append((int(plan.permitted_LE.sum()), plan.local_steps))
    assert work[-1] == (8, 4)
    assert [held for held, _ in work] == sorted(held for held, _ in work)
    assert min(work) < (8, 4), "no limit bound anything"


def test_the_smallest_of_all_budgets_counts_time() -> None:
    whole = seconds(planned(RATES))
    tiers = ("unlimited", f"{RATES},time={0.6 * whole!r}", "speed=1e9,downlink=1Gbit,uplink=1Gbit,time=1h")
    assert 2 <= FedAvgSmallest(population(budgets=tiers)).experts().sum() < 8
