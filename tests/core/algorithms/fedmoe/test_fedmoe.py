"""FedMoE: its equations as wired, and what stage two does to a sub-model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hand_made import EXPERTS, LAYERS, PRIOR, SAMPLES, TRAINED, mask, model, plan_for, play, result_for, spread
from hand_made import population as hand_made_population

from fedmoe_core.algorithms.fedmoe.fedmoe import FROZEN, NEW, SETTLED, TRIAL, ClientMap, FedMoE
from fedmoe_core.algorithms.fedmoe.full_model_probe import WholeModelProbe
from fedmoe_core.budget.from_spec import cost_model_of
from fedmoe_core.budget.limits import Cost
from fedmoe_core.layer.router_loss import SwitchBalance
from fedmoe_core.messages.plan import ExpertPlan
from fedmoe_core.messages.result import LocalFailure, LocalResult
from fedmoe_core.messages.update import ClientUpdate
from fedmoe_core.model.spec import Evaluation
from fedmoe_core.server.accumulator import Accumulator
from fedmoe_core.server.state import Population, ServerState, initial_state, remember

ALL_LE = np.ones((LAYERS, EXPERTS), dtype=bool)
RNG = np.random.default_rng(3)


def population(*overrides: str, budgets: tuple[str, ...] = ("unlimited",) * 3, clients: int = 3) -> Population:
    facts = hand_made_population(*overrides, budgets=budgets)
    samples_C, lora_costs = np.resize(SAMPLES, clients), replace(facts.costs, lora_rank=8)
    return replace(facts, samples_C=samples_C, validation_tokens_C=np.full(clients, 32), lora_costs=lora_costs)


def finished(client: int, quality: float = -1.0) -> LocalResult:
    result = result_for(client)
    found = Evaluation(-10 * quality, 10)
    return replace(result, validation=found, validation_profile=result.profile)


def by_the_paper() -> dict[str, np.ndarray]:
    """Algorithm 1's modular aggregation, one expert and one router row at a time."""
    new = {key: old.numpy().copy() for key, old in model().items()}
    for layer, expert in product(range(LAYERS), range(EXPERTS)):
        users = [c for c in range(3) if TRAINED[c][layer, expert] and finished(c).profile.rows_LE[layer, expert] > 0]
        for key in (f"moe.{layer}.{name}" for name in ("w_in", "w_out", "router")):
            copies = [model()[key].numpy()[expert] + spread(c, key)[expert] for c in users]
            if len(users) == 1:
                new[key][expert] = copies[0]
            elif users:
                weights = SAMPLES[users] / SAMPLES[users].sum()
                new[key][expert] = sum(w * copy for w, copy in zip(weights, copies, strict=True))
    return new


def test_modular_aggregation_is_that_of_algorithm_1() -> None:
    after, _ = play(FedMoE(population()), [finished(c) for c in range(3)])
    for key, wanted in by_the_paper().items():
        np.testing.assert_allclose(after.params[key].numpy(), wanted, rtol=0, atol=1e-7, err_msg=key)


def test_an_unused_expert_stays_bit_identical_and_a_single_holders_copy_replaces() -> None:
    after, updates = play(FedMoE(population()), [finished(c) for c in range(3)])
    used_CLE = np.stack([update.expert_weight_LE > 0 for update in updates])
    counts_LE = used_CLE.sum(axis=0)
    assert {0, 1, 2} <= set(counts_LE.ravel())  # nobody, one, several
    for layer, expert in product(range(LAYERS), range(EXPERTS)):
        for key in (f"moe.{layer}.{name}" for name in ("w_in", "w_out", "router")):
            old, new = model()[key][expert], after.params[key][expert]
            if counts_LE[layer, expert] == 0:
                assert torch.equal(new, old), key
            elif counts_LE[layer, expert] == 1:
                client = int(np.flatnonzero(used_CLE[:, layer, expert])[0])
                copy = old + torch.from_numpy(spread(client, key)[expert])
                np.testing.assert_allclose(new.numpy(), copy.numpy(), rtol=0, atol=2e-9)


# Stage one.


def known_of(facts: Population, **arrays: np.ndarray) -> ClientMap:
    return replace(ClientMap.of(initial_state({}, len(facts.budgets)), facts), **arrays)


def test_stage_one_goes_by_own_probe_then_the_mean_by_data_volume_then_public_data() -> None:
    facts = population()
    nobody = known_of(facts)
    np.testing.assert_allclose(nobody.stage_one(1, facts), PRIOR.hits_LE / PRIOR.tokens_L[:, None])
    probe_CLE = RNG.random((3, LAYERS, EXPERTS))
    probe_CLE[1] = 0
    known = known_of(facts, probe_CLE=probe_CLE)
    np.testing.assert_array_equal(known.stage_one(2, facts), probe_CLE[2])
    mean_LE = (SAMPLES[0] * probe_CLE[0] + SAMPLES[2] * probe_CLE[2]) / (SAMPLES[0] + SAMPLES[2])
    np.testing.assert_allclose(known.stage_one(1, facts), mean_LE)


MEMORY = [
    cost_model_of(population().spec, tokens=64).predict(some_LE, some_LE, local_steps=1).memory_bytes
    for some_LE in (mask("x...", "x..."), mask("xxx.", "xx.."), ALL_LE)
]


@pytest.mark.parametrize("fill", [1.0, 0.8])
@pytest.mark.parametrize("budget", ["experts=3", "experts=5", f"memory={MEMORY[0]}", f"memory={MEMORY[1]}"])
def test_eq3_theta_is_the_largest_that_the_budget_allows(budget: str, fill: float) -> None:
    facts = population(f"fedmoe.fill={fill}", "fedmoe.balance=0", budgets=(budget,) * 3)
    plan = FedMoE(facts).plan(initial_state(model(), 3), [1])[0]
    limit = facts.budgets[1]
    share_LE = PRIOR.hits_LE / PRIOR.hits_LE.sum(axis=1, keepdims=True)
    layer = [bits for bits in product([False, True], repeat=EXPERTS) if any(bits)]
    best, least_fits = 0.0, False
    for chosen_LE in (np.array(rows) for rows in product(layer, repeat=LAYERS)):
        cost = facts.costs.predict(chosen_LE, chosen_LE, local_steps=1)
        need, room = (cost.experts, limit.experts) if limit.experts else (cost.memory_bytes, limit.memory_bytes)
        assert room is not None
        if need <= fill * room:
            best, least_fits = max(best, (share_LE * chosen_LE).sum(axis=1).min()), True
    if not least_fits:  # the reserve gives way to one expert per layer
        best = share_LE.max(axis=1).min()
    assert (share_LE * plan.permitted_LE).sum(axis=1).min() == pytest.approx(best)
    assert limit.fits(plan.predicted)


def first_plan(budget: str, *overrides: str) -> ExpertPlan:
    return FedMoE(population(*overrides, budgets=(budget,) * 3)).plan(initial_state(model(), 3), [0])[0]


def test_only_a_client_that_bears_the_whole_model_probes_it_and_is_charged() -> None:
    bare = first_plan("unlimited").predicted
    rich = "experts=8", f"memory={bare.memory_bytes},down={bare.bytes_down},up={bare.bytes_up},flops={bare.flops}"
    poor = "experts=7", f"down={bare.bytes_down - 1}", "flops=6e4"
    costs = population().costs
    for budget in rich:
        plan = first_plan(budget)
        assert plan.extras.before == WholeModelProbe(5, 8)
        assert plan.predicted.bytes_down == costs.bytes_down(ALL_LE)  # the whole model travels once
        tuned = replace(costs, lora_rank=8)
        assert plan.extras.surcharge.memory_bytes == tuned.memory(ALL_LE, ALL_LE)
        passes = tuned.forward_flops(ALL_LE, tokens=32) + costs.forward_flops(plan.permitted_LE, tokens=32)
        assert plan.extras.surcharge.flops == pytest.approx(5 * 8 * tuned.step_flops(ALL_LE, ALL_LE) + passes)
        assert plan.extras.surcharge.experts == ALL_LE.size
    for budget in poor:
        assert first_plan(budget).extras.before is None


def test_stage_one_tunes_as_often_as_a_clients_operations_pay() -> None:
    tuned = population().lora_costs
    assert tuned is not None
    once, bare = 8 * tuned.step_flops(ALL_LE, ALL_LE), first_plan("unlimited", "fedmoe.tunings=0")
    assert bare.extras.before == WholeModelProbe(0, 8)
    for times in (0, 1, 3):
        plan = first_plan(f"flops={bare.predicted.flops + (times + 0.5) * once}")
        assert isinstance(plan.extras.before, WholeModelProbe)
        # The least sub-model's steps are fewer than the bare plan's.
        assert times <= plan.extras.before.tunings <= times + 1
        assert plan.budget.fits(plan.predicted)


def test_a_client_probes_once_and_stage_one_ends_with_its_first_round() -> None:
    facts = population(budgets=("unlimited", "experts=3", "experts=3"))
    algorithm = FedMoE(facts)
    state = algorithm.init(model())
    first = algorithm.plan(state, [0, 1, 2])
    assert [plan.extras.before is not None for plan in first] == [True, False, False]
    probe = torch.from_numpy(RNG.dirichlet(np.full(EXPERTS, 0.3), LAYERS))
    results = [replace(finished(0), probed={"probe": probe}), finished(1), LocalFailure(Cost(), "out of memory")]
    state, _ = play(algorithm, results, asked={0: first[0].extras})
    known = ClientMap.of(state, facts)
    assert known.phase_C.tolist() == [SETTLED, SETTLED, NEW]
    np.testing.assert_array_equal(known.probe_CLE[0], probe.numpy())
    assert not known.usage_CLE.any()  # the first sub-model was not yet its own
    best_LE = np.argsort(-probe.numpy(), axis=1)
    for layer in range(LAYERS):  # client 1 has no probe, so that of client 0 is the mean
        held = np.flatnonzero(known.held_CLE[1, layer])
        assert set(held) == set(best_LE[layer, : len(held)])
    second = algorithm.plan(state, [0, 1])
    assert [plan.extras.before for plan in second] == [None, None]
    np.testing.assert_array_equal(second[1].permitted_LE, known.held_CLE[1])
    assert known.held_CLE[1].sum() <= 3


# Stage two.

CLIENTS = 5


def report(algorithm: FedMoE, client: int, quality: float, rows_LE: np.ndarray | None = None) -> ClientUpdate:
    """What a client of the ready state would report, by its own sub-model."""
    held_LE = ready(algorithm)[0].held_CLE[client]
    profile = replace(PRIOR, rows_LE=PRIOR.hits_LE * held_LE if rows_LE is None else rows_LE, held_LE=held_LE)
    result = LocalResult({}, profile, Cost(), (1.0,), validation=Evaluation(-quality, 1), validation_profile=profile)
    plan = replace(plan_for(0), client=client, permitted_LE=ALL_LE, trainable_LE=~ALL_LE)
    return algorithm.answer(plan, result)


HELD_CLE = np.stack([mask("xx..", "x..."), mask("xxx.", "xx.."), mask("xxxx", "x.xx"), mask("...x", "...x"), ALL_LE])
USAGE_CLE = np.random.default_rng(8).random((CLIENTS, LAYERS, EXPERTS)) * HELD_CLE


def ready(algorithm: FedMoE) -> tuple[ClientMap, ServerState]:
    """Five clients in the midst of stage two; client 3 has not been heard yet."""
    phases = np.array([SETTLED, SETTLED, SETTLED, NEW, SETTLED])
    seen_C = phases != NEW
    known = known_of(
        algorithm.population,
        held_CLE=HELD_CLE * seen_C[:, None, None],
        usage_CLE=USAGE_CLE * seen_C[:, None, None],
        best_C=np.where(seen_C, 0.5, -np.inf),
        phase_C=phases,
    )
    return known, replace(initial_state(model(), CLIENTS), memory=remember(known), visits=(1,) * CLIENTS)


def five(*overrides: str, budget: str = "unlimited") -> FedMoE:
    return FedMoE(population(*overrides, budgets=(budget,) * CLIENTS, clients=CLIENTS))


def after(algorithm: FedMoE, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
    sums = Accumulator(algorithm.population.spec.params)
    return algorithm.advance(state, sums.sums(), updates)


def play_qualities(algorithm: FedMoE, client: int, qualities: Sequence[float]) -> list[ClientMap]:
    state, seen = ready(algorithm)[1], []
    for quality in qualities:
        state = after(algorithm, state, [report(algorithm, client, quality)])
        seen.append(ClientMap.of(state, algorithm.population))
    return seen


def advised(client: int, count: int, *, most: int = 99) -> np.ndarray:
    """Eqs. 4-6 by hand for a client of the ready state whose usage is as its report of the prior makes it."""
    p = USAGE_CLE.copy()
    p[3] = 0
    share = PRIOR.hits_LE / PRIOR.tokens_L[:, None]
    for _ in range(3):
        p[client] = np.where(HELD_CLE[client], (p[client] + share) / 2, 0)
    sims = {
        a: float((p[client] * p[a]).sum() / np.sqrt((p[client] ** 2).sum() * (p[a] ** 2).sum())) for a in (0, 1, 2, 4)
    }
    similar = sorted((a for a in sims if a != client), key=lambda a: -sims[a])[:count]
    n = round(np.mean([HELD_CLE[a].sum() for a in similar]) - HELD_CLE[client].sum())
    phat = sum(sims[a] * p[a] for a in similar) / sum(sims[a] for a in similar)
    held = HELD_CLE[client].copy()
    places = sorted(product(range(LAYERS), range(EXPERTS)), key=lambda place: phat[place])
    if n > 0:
        for place in [place for place in reversed(places) if not held[place]][: min(n, most - held.sum())]:
            held[place] = True
    removed = 0
    for place in places:
        if removed < -n and held[place] and held[place[0]].sum() > 1:
            held[place], removed = False, removed + 1
    return held


@pytest.mark.parametrize(("client", "similar"), [(0, 2), (0, 3), (1, 1), (2, 1), (4, 2), (4, 3)])
def test_eqs_4_to_6_change_a_sub_model_after_three_participations_without_improvement(
    client: int, similar: int
) -> None:
    algorithm = five(f"fedmoe.similar={similar}")
    seen = play_qualities(algorithm, client, [0.5, 0.4, 0.3])
    for known in seen[:2]:
        np.testing.assert_array_equal(known.held_CLE[client], HELD_CLE[client])
    wanted_LE = advised(client, similar)
    assert wanted_LE.sum() != HELD_CLE[client].sum()
    np.testing.assert_array_equal(seen[2].held_CLE[client], wanted_LE)
    np.testing.assert_array_equal(seen[2].before_CLE[client], HELD_CLE[client])
    assert seen[2].phase_C[client] == TRIAL


def test_additions_stay_within_the_clients_own_budget() -> None:
    algorithm = five("fedmoe.similar=3", budget="experts=4")
    seen = play_qualities(algorithm, 0, [0.5, 0.4, 0.3])
    np.testing.assert_array_equal(seen[2].held_CLE[0], advised(0, 3, most=4))
    assert seen[2].held_CLE[0].sum() == 4


def test_no_improvement_on_trial_reverts_and_freezes_for_good() -> None:
    seen = play_qualities(five(), 0, [0.4] * 3 + [0.45] * 3 + [0.1] * 9)
    assert [known.phase_C[0] for known in seen] == [SETTLED] * 2 + [TRIAL] * 3 + [FROZEN] * 10
    changed = [not np.array_equal(known.held_CLE[0], HELD_CLE[0]) for known in seen]
    assert changed == [False] * 2 + [True] * 3 + [False] * 10


def test_an_improvement_makes_the_change_stand() -> None:
    seen = play_qualities(five(), 0, [0.4] * 3 + [0.45, 0.6] + [0.55] * 2)
    assert [known.phase_C[0] for known in seen] == [SETTLED] * 2 + [TRIAL] * 2 + [SETTLED] * 3
    np.testing.assert_array_equal(seen[-1].held_CLE[0], seen[2].held_CLE[0])
    assert seen[-1].best_C[0] == 0.6


def test_usage_is_a_moving_average_within_the_sub_model() -> None:
    algorithm = five("fedmoe.smoothing=0.25")
    rows_LE = np.arange(8.0).reshape(2, 4) * HELD_CLE[0]
    state = after(algorithm, ready(algorithm)[1], [report(algorithm, 0, 1.0, rows_LE)])
    found_LE = ClientMap.of(state, algorithm.population).usage_CLE[0]
    share_LE = rows_LE / PRIOR.tokens_L[:, None]
    np.testing.assert_allclose(found_LE, 0.75 * USAGE_CLE[0] + 0.25 * share_LE)


def test_permuting_the_reports_changes_nothing_of_the_map() -> None:
    algorithm = five("fedmoe.patience=1")
    updates = [report(algorithm, client, 0.1 * client) for client in (0, 1, 2, 4)]
    one, other = (after(algorithm, ready(algorithm)[1], order).memory for order in (updates, updates[::-1]))
    assert all(torch.equal(one[key], other[key]) for key in one)
    known = ClientMap.of(after(algorithm, ready(algorithm)[1], updates), algorithm.population)
    assert (known.phase_C == TRIAL).sum() >= 2  # more than one changed on the same advice


def test_every_client_balances_its_router_over_the_served_experts() -> None:
    plan = five("fedmoe.balance=0.02").plan(initial_state(model(), CLIENTS), [0])[0]
    assert plan.extras.aux == SwitchBalance(0.02, served_only=True)
    assert plan.extras.validate
    assert five("fedmoe.balance=0").plan(initial_state(model(), CLIENTS), [0])[0].extras.aux is None


def test_the_map_of_all_clients_is_read_once_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """For each client it would be quadratic: 55 MB are copied at 2,000 clients, 24 layers and 64 experts."""
    read: list[ServerState] = []
    of = ClientMap.of

    def counted(state: ServerState, facts: Population) -> ClientMap:
        read.append(state)
        return of(state, facts)

    monkeypatch.setattr(ClientMap, "of", counted)
    assert len(five().plan(initial_state(model(), CLIENTS), range(CLIENTS))) == CLIENTS
    assert len(read) == 1


# Whole runs.


def test_inv11_a_failed_client_leaves_the_map_as_it_was() -> None:
    algorithm = five()
    known, state = ready(algorithm)
    lost = algorithm.answer(plan_for(1), LocalFailure(Cost(), "out of memory"))
    assert (lost.status, lost.private) == ("failed", {})
    following = after(algorithm, state, [lost])
    assert all(torch.equal(following.memory[key], value) for key, value in remember(known).items())
    assert following.visits[1] == 2
