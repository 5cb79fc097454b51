"""Budget solvers against brute force, and plans against the budgets they were made for."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from selection_cases import MODEL, SEEDS, subsets

from fedmoe_core.budget.cost_model import CostModel, TrunkCost
from fedmoe_core.budget.limits import Budget, BudgetError
from fedmoe_core.selection import knapsack as knapsack_file
from fedmoe_core.selection.knapsack import knapsack, select_top_n
from fedmoe_core.selection.within_budget import choose, explore, fit_flops

SIZES = st.tuples(st.integers(1, 3), st.integers(1, 4))


def draw(seed: int, sizes: tuple[int, int], *, ties: bool) -> tuple[np.random.Generator, np.ndarray]:
    """Scores of both signs; with ties, from a handful of values that floats add exactly."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(-2, 4, sizes) / 4.0 if ties else rng.standard_normal(sizes) + rng.choice([-1, 0, 1])
    return rng, scores


@given(SEEDS, SIZES, st.booleans())
def test_inv8_top_n_equals_brute_force(seed: int, sizes: tuple[int, int], ties: bool) -> None:
    rng, scores_LE = draw(seed, sizes, ties=ties)
    n = int(rng.integers(sizes[0], scores_LE.size + 1))
    chosen_LE = select_top_n(scores_LE, n)
    masks = subsets(*sizes)
    allowed = masks[masks.sum(axis=(1, 2)) <= n]
    best = (allowed * scores_LE).sum(axis=(1, 2)).max()
    assert scores_LE[chosen_LE].sum() == pytest.approx(best, abs=1e-12)
    assert chosen_LE.sum() <= n
    assert chosen_LE.any(axis=1).all()
    # A negative score is there only as the one expert of its layer.
    alone_L = chosen_LE.sum(axis=1) == 1
    assert not (chosen_LE & (scores_LE < 0) & ~alone_L[:, None]).any()


def test_top_n_breaks_ties_by_index() -> None:
    # 256 experts: an unstable sort keeps the order of fewer than 17 equal scores by accident
    scores_LE = np.random.default_rng(0).integers(0, 3, (4, 64)).astype(float)
    first = sorted(range(256), key=lambda place: (-scores_LE.flat[place], place))[:100]
    np.testing.assert_array_equal(np.flatnonzero(select_top_n(scores_LE, 100)), sorted(first))


def test_top_n_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="at least 3"):
        select_top_n(np.zeros((3, 4)), 2)
    with pytest.raises(ValueError, match="layer 1, expert 2"):
        select_top_n(np.array([[0, 0, 0], [0, 0, np.nan]]), 2)


COSTS = st.sampled_from(["unequal", "equal", "per layer", "huge", "zeros", "worthless"])


@settings(max_examples=150, deadline=None)
@given(SEEDS, SIZES, st.integers(1, 3), COSTS, st.booleans())
def test_inv8_knapsack_equals_brute_force(seed: int, sizes: tuple[int, int], rows: int, kind: str, ties: bool) -> None:
    rng, values_LE = draw(seed, sizes, ties=ties)
    if kind == "worthless":  # the first round, before anything was measured
        values_LE = np.zeros(sizes)
    if kind == "equal":
        costs_DLE = np.broadcast_to(rng.integers(1, 9, (rows, 1, 1)), (rows, *sizes)).copy()
    elif kind == "per layer":
        costs_DLE = np.repeat(rng.integers(1, 9, (rows, sizes[0], 1)), sizes[1], axis=2)
    else:
        # huge: beyond the tolerance (2^45) and beyond the range (2^52) of the floating-point solver
        costs_DLE = rng.integers(
            0 if kind == "zeros" else 1, 2 ** rng.choice([45, 52]) if kind == "huge" else 9, (rows, *sizes)
        )
    limits_D = [int(cost.sum() * rng.random()) for cost in costs_DLE]
    masks = subsets(*sizes)
    used = np.einsum("dle,nle->nd", costs_DLE, masks)
    feasible = masks[(used <= limits_D).all(axis=1)]
    if not len(feasible):
        with pytest.raises(ValueError, match="one expert per MoE layer"):
            knapsack(values_LE, costs_DLE, limits_D)
        return
    best = (feasible * values_LE).sum(axis=(1, 2)).max()
    chosen_LE = knapsack(values_LE, costs_DLE, limits_D)
    assert values_LE[chosen_LE].sum() == pytest.approx(best, rel=1e-9, abs=1e-9)
    assert ((costs_DLE * chosen_LE).sum(axis=(1, 2)) <= limits_D).all()
    assert chosen_LE.any(axis=1).all()
    # Nothing that is worth at least nothing and still fits was left out.
    room_D = limits_D - (costs_DLE * chosen_LE).sum(axis=(1, 2))
    fits_LE = (costs_DLE <= room_D[:, None, None]).all(axis=0)
    assert not (fits_LE & ~chosen_LE & (values_LE >= 0)).any()


def test_inv8_a_set_over_the_limit_by_one_byte_is_not_accepted() -> None:
    """In 32 bits experts 0 and 1 seem to fit together; they are one byte over, and the answer must know."""
    costs_DLE = np.array([[[2**45 + 1, 2**45 + 3, 2**44]]])
    values_LE = np.array([[5.0, 4.0, 1.0]])
    np.testing.assert_array_equal(knapsack(values_LE, costs_DLE, [2**46 + 3]), [[True, False, True]])
    np.testing.assert_array_equal(knapsack(values_LE, costs_DLE, [2**46 + 4]), [[True, True, False]])


@settings(max_examples=50, deadline=None)
@given(SEEDS)
def test_inv8_a_larger_limit_never_lowers_the_value(seed: int) -> None:
    rng, values_LE = draw(seed, (3, 6), ties=False)
    costs_DLE = rng.integers(1, 1000, (2, 3, 6))
    limits = costs_DLE.min(axis=2).sum(axis=1) + rng.integers(0, 3000, 2) + 1000
    less_LE = knapsack(values_LE, costs_DLE, limits.tolist())
    more_LE = knapsack(values_LE, costs_DLE, (limits + rng.integers(0, 1000, 2)).tolist())
    assert values_LE[more_LE].sum() >= values_LE[less_LE].sum() - 1e-9


def test_knapsack_refuses_fractions_of_bytes() -> None:
    with pytest.raises(ValueError, match="integers"):
        knapsack(np.zeros((1, 2)), np.full((1, 1, 2), 0.5), [3])


def test_choose_by_count_is_eq_15() -> None:
    _, scores_LE = draw(8, (3, 6), ties=False)
    permitted_LE, trainable_LE = choose(Budget(experts=7), MODEL, scores_LE)
    np.testing.assert_array_equal(permitted_LE, select_top_n(scores_LE, 7))
    np.testing.assert_array_equal(trainable_LE, permitted_LE)


def budget_of(rng: np.random.Generator, share: float) -> Budget:
    """A budget around what ``share`` of the model needs, with each resource limited or not."""
    shape = (MODEL.num_layers, MODEL.num_experts)
    some_LE = np.arange(MODEL.num_experts) < np.full(shape, max(1, round(share * MODEL.num_experts)))
    cost = MODEL.predict(some_LE, some_LE, local_steps=1)
    on = rng.random(4) < 0.6
    slack = rng.uniform(1.0, 1.3, 3)
    return Budget(
        memory_bytes=int(cost.memory_bytes * slack[0]) if on[0] else None,
        bytes_down=int(cost.bytes_down * slack[1]) if on[1] else None,
        bytes_up=int(cost.bytes_up * slack[2]) if on[2] else None,
        experts=int(rng.integers(3, 19)) if on[3] else None,
    )


@settings(max_examples=150, deadline=None)
@given(SEEDS, st.floats(0, 1), st.booleans())
def test_inv1_a_chosen_plan_is_inside_its_budget_and_the_best_there_is(seed: int, share: float, first: bool) -> None:
    rng, scores_LE = draw(seed, (3, 6), ties=False)
    budget = budget_of(rng, share)
    permitted_LE, trainable_LE = choose(budget, MODEL, scores_LE, first_participation=first)
    cost = MODEL.predict(permitted_LE, trainable_LE, local_steps=1, first_participation=first)
    assert budget.violations(cost) == []
    assert permitted_LE.any(axis=1).all()
    np.testing.assert_array_equal(permitted_LE, trainable_LE)
    # In one layer all experts cost the same, so the best of all plans is among best-first prefixes per layer.
    order = np.argsort(-scores_LE, axis=1)
    best = -np.inf
    for counts in product(range(1, 7), repeat=3):
        plan_LE = np.zeros((3, 6), dtype=bool)
        for layer, count in enumerate(counts):
            plan_LE[layer, order[layer, :count]] = True
        if budget.fits(MODEL.predict(plan_LE, plan_LE, local_steps=1, first_participation=first)):
            best = max(best, scores_LE[plan_LE].sum())
    assert scores_LE[permitted_LE].sum() == pytest.approx(best) or permitted_LE.all()


@given(SEEDS)
def test_inv9_a_budget_for_the_whole_model_takes_all_of_it_whatever_the_scores(seed: int) -> None:
    _, scores_LE = draw(seed, (3, 6), ties=False)
    everything = MODEL.predict(np.ones((3, 6), bool), np.ones((3, 6), bool), local_steps=1)
    roomy = Budget(everything.memory_bytes, None, everything.bytes_down, everything.bytes_up, everything.experts)
    for mode in ("compact", "backward-masked"):
        for budget in (Budget(), Budget(experts=18), roomy):
            permitted_LE, trainable_LE = choose(budget, MODEL, scores_LE, mode=mode)
            assert permitted_LE.all()
            assert trainable_LE.all()


@pytest.mark.parametrize("resource", ["memory", "down", "up", "experts"])
def test_inv1_a_budget_too_small_is_refused_with_the_number_that_would_do(resource: str) -> None:
    _, scores_LE = draw(2, (3, 6), ties=False)
    with pytest.raises(ValueError) as error:
        choose(Budget.parse(f"{resource}=2"), MODEL, scores_LE, client=3)
    message = str(error.value)
    assert message.startswith(f"client 3: {resource} budget")
    assert "cannot hold one expert per MoE layer" in message
    needed = re.search(r"at least (.*) is needed$", message)
    assert needed is not None
    enough = Budget.parse(f"{resource}={needed[1].removesuffix(' experts')}")
    permitted_LE, trainable_LE = choose(enough, MODEL, scores_LE)
    assert enough.fits(MODEL.predict(permitted_LE, trainable_LE, local_steps=1))


def test_inv1_every_resource_that_falls_short_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"memory budget .* and up budget .*at least .* of memory and .* of up is needed"
    ):
        choose(Budget.parse("memory=1KiB,up=1kB"), MODEL, np.zeros((3, 6)))


def test_backward_masked_holds_everything_and_trains_the_best() -> None:
    _, scores_LE = draw(4, (3, 6), ties=False)
    permitted_LE, trainable_LE = choose(Budget(experts=5), MODEL, scores_LE, mode="backward-masked")
    assert permitted_LE.all()
    np.testing.assert_array_equal(trainable_LE, select_top_n(scores_LE, 5))
    cost = MODEL.predict(permitted_LE, trainable_LE, local_steps=1, mode="backward-masked")
    assert Budget(experts=5).fits(cost)


def test_inv1_backward_masked_refuses_limits_that_it_cannot_keep() -> None:
    scores_LE = np.ones((3, 6))
    with pytest.raises(ValueError, match=r"client 1: .*memory cannot choose.*selection\.mode=compact"):
        choose(Budget.parse("memory=1GiB"), MODEL, scores_LE, mode="backward-masked", client=1)
    with pytest.raises(ValueError, match=r"memory budget .* cannot hold every expert"):
        choose(Budget.parse("memory=40KiB,experts=5"), MODEL, scores_LE, mode="backward-masked")
    roomy = Budget.parse("memory=1GiB,experts=5")
    permitted_LE, trainable_LE = choose(roomy, MODEL, scores_LE, mode="backward-masked")
    assert roomy.fits(MODEL.predict(permitted_LE, trainable_LE, local_steps=1, mode="backward-masked"))


PLAN_LE = np.array([[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1]], dtype=bool)


def test_a_flop_budget_is_met_by_steps_then_k_then_the_trainable_share() -> None:
    step = {k: MODEL.step_flops(PLAN_LE, PLAN_LE, top_k=k) for k in (3, 2, 1)}

    def fit(flops: float | None) -> tuple[int, int, int]:
        fitted = fit_flops(Budget(flops=flops), MODEL, PLAN_LE, PLAN_LE, local_steps=8)
        return fitted.local_steps, fitted.top_k, int(fitted.trainable_LE.any(axis=1).sum())

    assert fit(None) == (8, 3, 3)
    assert fit(8 * step[3]) == (8, 3, 3)
    assert fit(8 * step[3] - 1) == (7, 3, 3)
    assert fit(step[3]) == (1, 3, 3)
    assert fit(step[3] - 1) == (1, 2, 3)
    assert fit(step[1]) == (1, 1, 3)
    assert fit(step[1] - 1) == (1, 1, 2)
    one_layer = MODEL.step_flops(PLAN_LE, PLAN_LE & np.array([[False], [False], [True]]), top_k=1)
    assert fit(one_layer) == (1, 1, 1)
    with pytest.raises(ValueError, match=r"client 5: flops budget .* at least \S+ is needed"):
        fit_flops(Budget(flops=one_layer - 1), MODEL, PLAN_LE, PLAN_LE, local_steps=8, client=5)


def test_k_is_never_more_than_a_layer_holds() -> None:
    one_LE = np.eye(3, 6, dtype=bool)
    for flops in (None, 1e12):
        assert fit_flops(Budget(flops=flops), MODEL, one_LE, one_LE, local_steps=8) == (8, 1, one_LE)


def test_a_flop_budget_freezes_the_least_valuable_layers_first() -> None:
    step = MODEL.step_flops(PLAN_LE, PLAN_LE, top_k=1)
    scores_LE = np.array([[3.0], [1.0], [2.0]]) * PLAN_LE / PLAN_LE.sum(axis=1, keepdims=True)
    fitted = fit_flops(Budget(flops=step - 1), MODEL, PLAN_LE, PLAN_LE, local_steps=1, scores_LE=scores_LE)
    np.testing.assert_array_equal(fitted.trainable_LE.any(axis=1), [True, False, True])


def test_inv1_a_refused_flop_budget_names_a_number_that_does() -> None:
    with pytest.raises(ValueError) as error:
        fit_flops(Budget(flops=10.0), MODEL, PLAN_LE, PLAN_LE, local_steps=4)
    needed = re.search(r"at least (\S+) is needed", str(error.value))
    assert needed is not None
    fitted = fit_flops(Budget(flops=float(needed[1])), MODEL, PLAN_LE, PLAN_LE, local_steps=4)
    assert fitted.local_steps == 1


@given(SEEDS, st.floats(0, 3), st.integers(1, 6))
def test_inv1_fitted_work_is_inside_the_flop_budget(seed: int, scale: float, steps: int) -> None:
    rng = np.random.default_rng(seed)
    trainable_LE = PLAN_LE & (rng.random(PLAN_LE.shape) < 0.7)
    trainable_LE[0, 0] = True
    budget = Budget(flops=scale * MODEL.step_flops(PLAN_LE, trainable_LE))
    try:
        fitted = fit_flops(budget, MODEL, PLAN_LE, trainable_LE, local_steps=steps)
    except ValueError:
        first_layer = trainable_LE & np.array([[True], [False], [False]])
        assert MODEL.step_flops(PLAN_LE, first_layer, top_k=1) > budget.flops
        return
    cost = MODEL.predict(PLAN_LE, fitted.trainable_LE, local_steps=fitted.local_steps, top_k=fitted.top_k)
    assert budget.fits(cost)
    assert 1 <= fitted.local_steps <= steps
    assert not (fitted.trainable_LE & ~trainable_LE).any()
    assert fitted.trainable_LE.any()


@given(SEEDS, st.floats(0, 1))
def test_inv1_exploration_costs_nothing(seed: int, chance: float) -> None:
    rng, scores_LE = draw(seed, (3, 6), ties=False)
    demand_LE = rng.random((3, 6)) * (rng.random((3, 6)) < 0.7)
    explored_LE = explore(PLAN_LE, demand_LE, scores_LE, chance=chance, rng=rng)
    assert MODEL.predict(explored_LE, explored_LE, local_steps=2) == MODEL.predict(PLAN_LE, PLAN_LE, local_steps=2)
    for layer in range(3):
        left = np.flatnonzero(PLAN_LE[layer] & ~explored_LE[layer])
        came = np.flatnonzero(explored_LE[layer] & ~PLAN_LE[layer])
        assert len(left) == len(came) <= 1
        if len(left):
            assert scores_LE[layer, left[0]] == scores_LE[layer, PLAN_LE[layer]].min()
            assert demand_LE[layer, came[0]] > 0


def test_exploration_is_drawn_by_demand_and_by_chance() -> None:
    demand_LE = np.tile([9.0, 9, 9, 1, 3, 0], (3, 1))
    permitted_LE = np.tile([True, True, True, False, False, False], (3, 1))
    came = np.zeros(6)
    for seed in range(600):
        explored_LE = explore(permitted_LE, demand_LE, demand_LE, chance=0.5, rng=np.random.default_rng(seed))
        came += (explored_LE & ~permitted_LE).sum(axis=0)
    # 1800 layers, half of which swap, in proportion 1 : 3; bounds are 5 standard deviations.
    assert came[5] == 0
    assert abs(came.sum() - 900) < 107
    assert abs(came[4] / came.sum() - 0.75) < 0.075


def test_exploration_repeats_with_its_seed_and_needs_someone_absent() -> None:
    scores_LE = np.arange(18.0).reshape(3, 6)
    twice = [explore(PLAN_LE, scores_LE + 1, scores_LE, chance=1.0, rng=np.random.default_rng(7)) for _ in range(2)]
    np.testing.assert_array_equal(*twice)
    assert ((twice[0] & ~PLAN_LE).sum(axis=1) == 1).all()
    everyone = np.ones((3, 6), dtype=bool)
    assert explore(everyone, scores_LE, scores_LE, chance=1.0, rng=np.random.default_rng(7)).all()


def test_selection_stays_exact_at_the_size_of_a_real_model() -> None:
    """27 layers of 64 experts (DeepSeekMoE-16B's shape), three resources and a stage per layer."""
    model = CostModel(27, 64, 6, hidden_size=2048, intermediate_size=1408, tokens=4096, trunk_params=10**9)
    stages = tuple(int(6e9 * (1 - stage / 40)) for stage in range(28))
    model = replace(model, trunk=TrunkCost({6: stages}))
    scores_LE = np.random.default_rng(0).random((27, 64))
    some_LE = np.arange(64) < np.full((27, 64), 12)
    cost = model.predict(some_LE, some_LE, local_steps=1)
    budget = Budget(memory_bytes=cost.memory_bytes, bytes_down=cost.bytes_down + 10**9, experts=400)
    permitted_LE, trainable_LE = choose(budget, model, scores_LE)
    assert budget.fits(model.predict(permitted_LE, trainable_LE, local_steps=1))
    assert scores_LE[permitted_LE].sum() > scores_LE[some_LE].sum()


def test_a_solver_that_gives_up_is_not_taken_for_a_budget_that_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Systems that try sizes go on after a BudgetError; a fault of the solver must not look like one."""
    values_LE, costs_DLE = np.array([[3.0, 1.0], [2.0, 5.0]]), np.array([[[4, 1], [1, 4]]])
    gave_up = SimpleNamespace(x=None, status=4, message="numerical trouble")
    monkeypatch.setattr(knapsack_file, "milp", lambda *_, **__: gave_up)
    with pytest.raises(RuntimeError, match=r"the solver gave up \(numerical trouble\)"):
        knapsack(values_LE, costs_DLE, [6])
    gave_up.status = knapsack_file.INFEASIBLE
    with pytest.raises(BudgetError, match="no set with one expert per MoE layer fits"):
        knapsack(values_LE, costs_DLE, [6])
