"""The algorithms against the paper's equations, written out in plain numpy over three clients made by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hand_made import (
    EVERY_LE,
    EXPERTS,
    HELD,
    LAYERS,
    NO_ROWS,
    PRIOR,
    PRIOR_G,
    SAMPLES,
    TRAINED,
    WEIGHTS,
    G,
    find_algorithm,
    model,
    plan_for,
    play,
    population,
    profiles,
    result_for,
    spread,
)

from fedmoe_core.algorithms.baselines import FedAvg, RandomExperts
from fedmoe_core.algorithms.hfedmoe import HFedMoE
from fedmoe_core.budget.from_spec import cost_model_of
from fedmoe_core.budget.limits import Cost
from fedmoe_core.config.systems import ALGORITHMS, PLACES
from fedmoe_core.messages.profile import profile_arrays
from fedmoe_core.messages.result import LocalFailure
from fedmoe_core.selection.importance import of_layer, reap
from fedmoe_core.server.state import ServerState, initial_state, pack_state, unpack_state

GATES = ("row-wise", "normalized", "literal", "fedavg")


def by_the_paper(gate: str, experts: str, *, tau: float, lam: float, participation: bool) -> dict[str, np.ndarray]:
    """Eqs. 16-21 on the router tables themselves, one expert at a time."""
    usage = [g_LTE.mean(axis=1) for g_LTE in G]  # 16
    importance = [lam * g_LTE.mean(axis=1) + (1 - lam) * g_LTE.max(axis=1) for g_LTE in G]  # 3, 4, 5
    everywhere = [(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
    passing = [{place for place in everywhere if usage[c][place] >= tau and TRAINED[c][place]} for c in range(3)]
    s_global = {place for c in range(3) for place in everywhere if usage[c][place] >= tau and HELD[c][place]}  # 18
    p = [{place: usage[c][place] * importance[c][place] for place in passing[c]} for c in range(3)]  # 19
    alpha = [sum(p[c].values()) / max(1, len(s_global)) for c in range(3)]  # 20
    new = {key: old.numpy().copy() for key, old in model().items()}
    for layer, expert in everywhere:
        voters = [c for c in range(3) if (layer, expert) in passing[c]]
        if participation:
            voters = [c for c in voters if (c, layer, expert) != NO_ROWS]
        total = sum(SAMPLES[c] for c in (range(3) if experts == "damped" else voters))
        for name in ("w_in", "w_out"):
            for c in voters:  # 17, on deltas
                new[f"moe.{layer}.{name}"][expert] += SAMPLES[c] / total * spread(c, f"moe.{layer}.{name}")[expert]
        key = f"moe.{layer}.router"
        old, deltas = model()[key].numpy()[expert], [spread(c, key)[expert] for c in range(3)]
        if gate == "row-wise":
            weight = [p[c].get((layer, expert), 0.0) for c in range(3)]
        elif gate == "fedavg":
            weight = list(SAMPLES / SAMPLES.sum())
        else:
            weight = alpha
        if gate == "literal" and sum(alpha) > 0:  # 21 as printed, on the routers themselves
            new[key][expert] = sum(alpha[c] * (old + deltas[c]) for c in range(3))
        elif gate != "literal" and sum(weight) > 0:  # 21, normalised
            new[key][expert] = old + sum(w * d for w, d in zip(weight, deltas, strict=True)) / sum(weight)
    return new


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("experts", ["participation", "damped"])
@pytest.mark.parametrize("participation", [True, False])
@pytest.mark.parametrize("tau", [0.0, 0.14])  # 0.14 lies above the usage of two of client 1's three experts
def test_inv9_a_round_is_eqs_16_to_21(gate: str, experts: str, participation: bool, tau: float) -> None:
    words = [f"aggregation.gate={gate}", f"aggregation.experts={experts}", f"aggregation.tau={tau}"]
    after, _ = play(
        HFedMoE(population(*words, f"aggregation.participation={participation}".lower(), "selection.lam=0.3"))
    )
    wanted = by_the_paper(gate, experts, tau=tau, lam=0.3, participation=participation)
    moved = 0
    for key, old in model().items():
        np.testing.assert_allclose(after.params[key].numpy(), wanted[key], rtol=0, atol=1e-7, err_msg=key)
        moved += not torch.equal(after.params[key], old)
    assert moved >= 4
    assert torch.equal(after.params["dense.head"], model()["dense.head"])


def test_the_settings_of_that_test_are_told_apart() -> None:
    """Every gate, expert rule, tau and participation gives another model, so no two could be confused."""
    cases = [
        by_the_paper(gate, experts, tau=tau, lam=0.3, participation=participation)
        for gate in GATES
        for experts in ("participation", "damped")
        for tau in (0.0, 0.14)
        for participation in (True, False)
    ]
    flat = [np.concatenate([case[key].ravel() for key in sorted(case)]) for case in cases]
    gaps = [np.abs(a - b).max() for i, a in enumerate(flat) for b in flat[:i]]
    assert min(gaps) > 1e-3


@pytest.mark.parametrize("gate", GATES)
def test_inv9_a_zero_sum_keeps_the_gate_and_the_experts_bit_for_bit(gate: str) -> None:
    """tau = 1: no expert carries the whole softmax, so nobody passes, S is empty and every sum of eqs. 17, 20 is 0."""
    after, _ = play(HFedMoE(population(f"aggregation.gate={gate}", "aggregation.tau=1")))
    for key, old in model().items():
        if not (gate == "fedavg" and key.endswith("router")):
            assert torch.equal(after.params[key], old), key


@pytest.mark.parametrize("gate", GATES[:2])
def test_inv9_rows_that_nobody_trained_keep_their_bits(gate: str) -> None:
    after, _ = play(HFedMoE(population(f"aggregation.gate={gate}")))
    for key, old in model().items():
        if key.startswith("moe."):
            trained_E = np.any([trained_LE[int(key.split(".")[1])] for trained_LE in TRAINED], axis=0)
            for expert in range(EXPERTS):
                assert torch.equal(after.params[key][expert], old[expert]) != trained_E[expert], (key, expert)


def test_tau_cuts_what_a_client_weighs_in() -> None:
    open_, cut = (
        HFedMoE(population(f"aggregation.tau={tau}", "aggregation.participation=false")).answer(
            plan_for(0), result_for(0)
        )
        for tau in (0.0, 0.2)
    )
    below_LE = G[0].mean(axis=1) < 0.2
    assert (below_LE & TRAINED[0]).any()
    assert (~below_LE & TRAINED[0]).any()
    np.testing.assert_array_equal(open_.expert_weight_LE > 0, TRAINED[0])
    np.testing.assert_array_equal(cut.expert_weight_LE, WEIGHTS[0] * (TRAINED[0] & ~below_LE))
    np.testing.assert_array_equal(cut.router_weight_LE > 0, TRAINED[0] & ~below_LE)
    assert cut.gate_weight < open_.gate_weight


@pytest.mark.parametrize("participation", [True, False])
def test_an_expert_without_rows_votes_only_where_participation_is_off(participation: bool) -> None:
    facts = population(f"aggregation.participation={participation}".lower())
    client, layer, expert = NO_ROWS
    update = HFedMoE(facts).answer(plan_for(client), result_for(client))
    assert update.expert_weight_LE[layer, expert] == (0 if participation else WEIGHTS[client])
    assert update.expert_weight_LE[layer, 1] == WEIGHTS[client]


def test_uniform_weighting_counts_every_client_alike() -> None:
    update = HFedMoE(population("aggregation.weighting=uniform")).answer(plan_for(2), result_for(2))
    assert update.sample_weight == 1
    assert set(np.unique(update.expert_weight_LE)) == {0.0, 1.0}


def test_the_automatic_gate_follows_the_mode() -> None:
    for mode, gate in (("compact", "row-wise"), ("backward-masked", "normalized")):
        automatic, named = (
            HFedMoE(population(f"selection.mode={mode}", f"aggregation.gate={word}")).answer(plan_for(0), result_for(0))
            for word in ("auto", gate)
        )
        np.testing.assert_array_equal(automatic.router_weight_LE, named.router_weight_LE)


@pytest.mark.parametrize("name", ["hfedmoe", "random", "fedavg"])
def test_inv11_a_failed_client_reports_and_weighs_nothing(name: str) -> None:
    facts = population()
    algorithm = find_algorithm(name, facts)
    failed = LocalFailure(Cost(flops=3.0), "loss is nan at step 1")
    results = [result_for(0), failed, result_for(2)]
    after, updates = play(algorithm, results)
    report = updates[1]
    assert (report.status, report.error, report.samples) == ("failed", "loss is nan at step 1", 0)
    assert report.cost.flops == 3.0
    assert report.sample_weight == WEIGHTS[1]
    assert not report.expert_weight_LE.any()
    assert not report.router_weight_LE.any()
    assert report.gate_weight == 0
    assert after.profiles[1] is None
    assert after.profiles[0] is not None
    assert after.visits == (1, 1, 1)  # it was sent a plan, and with it the trunk
    assert after.round == 1
    only_1 = TRAINED[1] & ~TRAINED[0] & ~TRAINED[2]
    both = [np.argwhere(mask_LE) for mask_LE in (only_1, TRAINED[0])]
    assert all(torch.equal(after.params[f"moe.{la}.w_in"][e], model()[f"moe.{la}.w_in"][e]) for la, e in both[0])
    assert not any(torch.equal(after.params[f"moe.{la}.w_in"][e], model()[f"moe.{la}.w_in"][e]) for la, e in both[1])


def heard(*, clients: tuple[int, ...] = (0, 2)) -> ServerState:
    """A state in which some clients have reported; the prior stands in for the others."""
    state = initial_state(model(), 3)
    known = profiles()
    return replace(state, profiles=tuple(known[c] if c in clients else None for c in range(3)))


@pytest.mark.parametrize("score", ["s", "ib"])
def test_inv7_scores_are_eqs_5_and_14_on_each_clients_router(score: str) -> None:
    facts = population(f"selection.score={score}", "selection.lam=0.3", "selection.beta=0.7")
    for client, found_LE in enumerate(HFedMoE(facts).scores(heard())):
        g_LTE = G[client] if client in (0, 2) else PRIOR_G
        mean_L1E = g_LTE.mean(axis=1, keepdims=True)
        wanted_LE = 0.3 * mean_L1E[:, 0] + 0.7 * g_LTE.max(axis=1)
        if score == "ib":
            wanted_LE = wanted_LE - 0.7 * (g_LTE * np.log(g_LTE / mean_L1E)).mean(axis=1)
        np.testing.assert_allclose(found_LE, wanted_LE, rtol=1e-10)


def test_taylor_scores_estimate_absent_experts_by_own_demand_times_pooled_worth() -> None:
    facts = population("selection.score=taylor", "selection.beta=0.7")
    state, known = heard(), profiles()
    found = HFedMoE(facts).scores(state)
    for client in range(3):
        mine, g_LTE = (known[client], G[client]) if client in (0, 2) else (PRIOR, PRIOR_G)
        for layer in range(LAYERS):
            worth = np.zeros(EXPERTS)
            for expert in range(EXPERTS):
                if client in (0, 2) and mine.rows_LE[layer, expert] > 0:
                    rate = mine.taylor_abs_LE[layer, expert] / mine.rows_LE[layer, expert]
                else:
                    value, demand = PRIOR.taylor_abs_LE[layer, expert], PRIOR.rows_LE[layer, expert]
                    for c in (0, 2):
                        if (rows := known[c].rows_LE[layer, expert]) > 0:
                            hits = known[c].hits_LE[layer, expert]
                            value, demand = value + known[c].taylor_abs_LE[layer, expert] / rows * hits, demand + hits
                    rate = value / demand
                worth[expert] = rate * mine.hits_LE[layer, expert]
            g_TE = g_LTE[layer]
            kl_E = (g_TE * np.log(g_TE / g_TE.mean(axis=0))).mean(axis=0)
            wanted_E = worth / worth.sum() - 0.7 * kl_E / np.log(len(g_TE))
            np.testing.assert_allclose(found[client][layer], wanted_E, rtol=1e-9)


@pytest.mark.parametrize("score", ["reap", "reap_sum"])
def test_reap_scores_are_shares_of_a_layer_and_know_the_worth_of_absent_experts(score: str) -> None:
    facts = population(f"selection.score={score}", "selection.beta=0.7")
    known = profiles()
    for client, found_LE in enumerate(HFedMoE(facts).scores(heard())):
        mine = known[client] if client in (0, 2) else PRIOR
        for layer in range(LAYERS):
            worth = np.zeros(EXPERTS)
            for expert in range(EXPERTS):
                if client in (0, 2) and mine.rows_LE[layer, expert] > 0:
                    rate = mine.reap_sum_LE[layer, expert] / mine.rows_LE[layer, expert]
                else:
                    value, demand = PRIOR.reap_sum_LE[layer, expert], PRIOR.rows_LE[layer, expert]
                    for c in (0, 2):
                        if (rows := known[c].rows_LE[layer, expert]) > 0:
                            hits = known[c].hits_LE[layer, expert]
                            value, demand = value + known[c].reap_sum_LE[layer, expert] / rows * hits, demand + hits
                    rate = value / demand
                hits = mine.hits_LE[layer, expert]
                worth[expert] = (rate if hits else 0.0) if score == "reap" else rate * hits
            np.testing.assert_allclose(found_LE[layer], worth / worth.sum(), rtol=1e-9)


def test_reap_is_a_mean_over_an_experts_own_rows() -> None:
    """Ten rows of 2 are as good as one of 2, and an expert without a row is worth nothing."""
    sums_LE, rows_LE = np.array([[20.0, 2.0, 0.0, 6.0]]), np.array([[10.0, 1.0, 0.0, 2.0]])
    np.testing.assert_array_equal(reap(sums_LE, rows_LE), [[2.0, 2.0, 0.0, 3.0]])
    np.testing.assert_array_equal(of_layer(np.stack([sums_LE[0], np.zeros(4)])).sum(axis=1), [1.0, 0.0])


MEMORY = cost_model_of(population().spec, tokens=64).predict(TRAINED[0], TRAINED[0], local_steps=1).memory_bytes
TIERS = ("experts=3", f"memory={MEMORY}", "unlimited")


def test_inv1_random_experts_fill_each_budget_as_hfedmoe_does() -> None:
    facts = population("selection.score=s", budgets=TIERS)
    state = initial_state(model(), 3)
    ours, theirs = HFedMoE(facts).plan(state, range(3)), RandomExperts(facts).plan(state, range(3))
    assert [plan.predicted.experts for plan in theirs] == [3, 4, 8]
    for mine, other in zip(ours, theirs, strict=True):
        # FLOPs depend on the split over layers: a layer with one expert gives each token one row, not k.
        assert replace(mine.predicted, flops=0) == replace(other.predicted, flops=0)
        assert (mine.local_steps, mine.budget) == (other.local_steps, other.budget)


def test_inv10_random_experts_are_equal_on_every_call_and_drawn_anew_each_round() -> None:
    facts = population(budgets=("experts=3",) * 3)
    state = initial_state(model(), 3)
    algorithm = RandomExperts(facts)

    def drawn(round_: int, clients: list[int]) -> list[bytes]:
        return [plan.permitted_LE.tobytes() for plan in algorithm.plan(replace(state, round=round_), clients)]

    assert drawn(0, [0, 1, 2]) == drawn(0, [0, 1, 2])
    assert drawn(0, [2]) == drawn(0, [0, 1, 2])[2:]  # whoever else is sampled
    many = {draw for round_ in range(20) for draw in drawn(round_, [0, 1, 2])}
    assert len(many) > 20  # of 48 sets of 3 with one in each layer
    other_seed = RandomExperts(population("seed=1", budgets=("experts=3",) * 3))
    assert [p.permitted_LE.tobytes() for p in other_seed.plan(state, [0, 1, 2])] != drawn(0, [0, 1, 2])


def test_random_experts_aggregate_as_hfedmoe_does() -> None:
    facts = population()
    ours, theirs = play(HFedMoE(facts))[0].params, play(RandomExperts(facts))[0].params
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_inv1_fedavg_plans_the_whole_model_and_is_charged_for_it() -> None:
    facts = population(budgets=TIERS)
    plans = FedAvg(facts).plan(initial_state(model(), 3), range(3))
    cost = facts.costs.predict(EVERY_LE, EVERY_LE, local_steps=facts.config.train.local_steps)
    for plan, budget, fits in zip(plans, facts.budgets, (False, False, True), strict=True):
        assert plan.trainable_LE.all()
        assert plan.predicted == cost
        assert budget.fits(plan.predicted) is fits
        assert plan.budget.fits(plan.predicted)  # no limit binds it, so its update is not refused either


def test_fedavg_moves_every_tensor_by_the_sample_weighted_mean() -> None:
    after, _ = play(FedAvg(population()))
    for key, old in model().items():
        step = sum(SAMPLES[c] / SAMPLES.sum() * spread(c, key) for c in range(3)) if key.startswith("moe.") else 0
        np.testing.assert_allclose(after.params[key].numpy(), old.numpy() + step, rtol=0, atol=1e-8, err_msg=key)


def test_every_name_of_the_configuration_is_an_algorithm() -> None:
    assert tuple(PLACES) == ALGORITHMS
    with pytest.raises(ValueError, match="did you mean 'hfedmoe'"):
        find_algorithm("hfedmo", population())


def test_inv10_the_state_after_a_round_survives_packing() -> None:
    state, _ = play(HFedMoE(population()))
    back = unpack_state(pack_state(state), round=state.round)
    assert (back.round, back.visits) == (state.round, state.visits) == (1, (1, 1, 1))
    assert all(torch.equal(back.params[key], value) for key, value in state.params.items())
    for ours, theirs in zip(back.profiles, state.profiles, strict=True):
        assert ours is not None
        assert theirs is not None
        for name, array in profile_arrays(theirs).items():
            np.testing.assert_array_equal(getattr(ours, name), array)
