"""The algorithms against the paper's equations, written out in plain numpy over three clients made by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedmoe_core.adapter import ModelSpec
from fedmoe_core.aggregate import Accumulator, SumSettings
from fedmoe_core.algorithms import find_algorithm
from fedmoe_core.algorithms.baselines import FedAvg, RandomExperts
from fedmoe_core.algorithms.hfedmoe import HFedMoE
from fedmoe_core.budget import Budget, Cost
from fedmoe_core.client import LocalResult
from fedmoe_core.config import Config
from fedmoe_core.costs import CostModel
from fedmoe_core.plan import ExpertPlan
from fedmoe_core.state import Population, ServerState, initial_state
from fedmoe_core.update import ClientProfile, ClientUpdate, ParamSpec

LAYERS, EXPERTS, HIDDEN, INNER, TOP_K = 2, 4, 3, 5, 2
TOKENS = (40, 23, 31)  # of each client, all different
SAMPLES = np.array([100, 50, 25])
WEIGHTS = SAMPLES / SAMPLES.max()
GATES = ("row-wise", "normalised", "literal", "fedavg")
KEYS = {"router": (EXPERTS, HIDDEN), "w_in": (EXPERTS, 2 * INNER, HIDDEN), "w_out": (EXPERTS, HIDDEN, INNER)}


def mask(*rows: str) -> np.ndarray:
    return np.array([[letter == "x" for letter in row] for row in rows])


# (0, 3) is only held frozen, (1, 1) by nobody; (1, 0) has one trainer, (0, 1) has three.
TRAINED = (mask("xx..", "x.x."), mask(".xx.", "..x."), mask("xxx.", "...x"))
HELD = (TRAINED[0], TRAINED[1], mask("xxxx", "...x"))
EVERY_LE = np.ones((LAYERS, EXPERTS), dtype=bool)
NO_ROWS = (1, 0, 2)  # client 1 trained expert 2 of layer 0 but no token of its own went there


def router_table(seed: int, tokens: int) -> np.ndarray:
    """G (L, tokens, E): a router with favourites."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1, (LAYERS, tokens, EXPERTS)) + rng.normal(0, 1, (LAYERS, 1, EXPERTS))
    odds = np.exp(logits)
    return odds / odds.sum(axis=2, keepdims=True)


def profile_of(g_LTE: np.ndarray, held_LE: np.ndarray, seed: int) -> ClientProfile:
    """The sums that a client would send for router probabilities ``g_LTE``."""
    rng = np.random.default_rng([seed, 1])
    top_LTE = g_LTE >= np.sort(g_LTE, axis=2)[:, :, [-TOP_K]]
    rows_LE = (top_LTE.sum(axis=1) + rng.integers(1, 9, held_LE.shape)) * held_LE
    taylor_LE = rng.uniform(0.1, 1, held_LE.shape) * rows_LE
    return ClientProfile(
        tokens_L=np.full(LAYERS, float(g_LTE.shape[1])),
        hits_LE=top_LTE.sum(axis=1).astype(float),
        prob_sum_LE=g_LTE.sum(axis=1),
        prob_max_LE=g_LTE.max(axis=1),
        plogp_sum_LE=(g_LTE * np.log(g_LTE)).sum(axis=1),
        lost_mass_L=(g_LTE.sum(axis=1) * ~held_LE).sum(axis=1),
        rows_LE=rows_LE.astype(float),
        taylor_LE=-taylor_LE / 2,
        taylor_abs_LE=taylor_LE,
        fisher_LE=taylor_LE**2,
        grad_sq_LE=taylor_LE,
        held_LE=held_LE,
    )


G = tuple(router_table(seed, tokens) for seed, tokens in enumerate(TOKENS))
PRIOR_G = router_table(9, 64)
PRIOR = profile_of(PRIOR_G, EVERY_LE, 9)


def profiles() -> list[ClientProfile]:
    found = [profile_of(g_LTE, held_LE, seed) for seed, (g_LTE, held_LE) in enumerate(zip(G, HELD, strict=True))]
    client, layer, expert = NO_ROWS
    rows_LE = found[client].rows_LE.copy()
    rows_LE[layer, expert] = 0
    found[client] = replace(found[client], rows_LE=rows_LE)
    return found


def specs() -> tuple[ParamSpec, ...]:
    found = [
        ParamSpec(f"moe.{layer}.{name}", "router" if name == "router" else "expert", shape, torch.float64, layer)
        for layer in range(LAYERS)
        for name, shape in KEYS.items()
    ]
    return (*found, ParamSpec("dense.head", "dense", (7, HIDDEN), torch.float64))


def population(*overrides: str, budgets: tuple[str, ...] = ("unlimited",) * 3) -> Population:
    # 28 + 30 bits in place of 36 + 16: weights then quantise to 1e-9, so that 1e-6 tells the equations apart.
    exact = ["aggregation.scale_bits=28", "aggregation.weight_bits=30", "clients=3"]
    spec = ModelSpec("hand", "causal_lm", LAYERS, EXPERTS, TOP_K, HIDDEN, INNER, "swiglu", specs())
    return Population(
        config=Config.load(None, [*exact, *overrides]).resolved(),
        spec=spec,
        budgets=tuple(Budget.parse(text, spec_experts=LAYERS * EXPERTS) for text in budgets),
        costs=CostModel.of(spec, tokens=64),
        samples_C=SAMPLES,
        prior=PRIOR,
    )


def model(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {spec.key: torch.randn(spec.shape, generator=generator, dtype=torch.float64) for spec in specs()}


def plan_for(client: int) -> ExpertPlan:
    return ExpertPlan(client, 0, HELD[client], TRAINED[client], TOP_K, 2, 0, Budget(), Cost())


def whole(plan: ExpertPlan, result: LocalResult) -> tuple[ExpertPlan, LocalResult]:
    """The same as FedAvg would have it: every expert trained, by nothing where the client's own delta has no row."""
    full = {key: torch.from_numpy(spread(plan.client, key)) for key in result.deltas}
    return replace(plan, permitted_LE=EVERY_LE, trainable_LE=EVERY_LE), replace(result, deltas=full)


def result_for(client: int) -> LocalResult:
    rng = np.random.default_rng([client, 7])
    deltas = {
        f"moe.{layer}.{name}": torch.from_numpy(rng.uniform(-0.5, 0.5, (int(trained_E.sum()), *shape[1:])))
        for layer, trained_E in enumerate(TRAINED[client])
        for name, shape in KEYS.items()
    }
    return LocalResult(deltas, profiles()[client], Cost(flops=5.0), (2.0, 1.5))


def spread(client: int, key: str) -> np.ndarray:
    """A client's delta in global coordinates, 0 where it trained nothing."""
    layer, name = int(key.split(".")[1]), key.split(".")[2]
    full = np.zeros(KEYS[name])
    full[TRAINED[client][layer]] = result_for(client).deltas[key].numpy()
    return full


def play(algorithm: Any, results: list[LocalResult] | None = None) -> tuple[ServerState, list[ClientUpdate]]:
    """One round as the simulator plays it: client, checked exact sums, apply."""
    facts: Population = algorithm.population
    rule = facts.config.aggregation
    settings = SumSettings(rule.scale_bits, rule.value_bound, rule.norm_bound, rule.weight_bits, max_clients=3)
    sums = Accumulator(facts.spec.params, settings, lr=facts.config.train.lr)
    updates = []
    for client, result in enumerate(results or [result_for(client) for client in range(3)]):
        plan = plan_for(client)
        if isinstance(algorithm, FedAvg):
            plan, result = whole(plan, result)
        update = algorithm.client(plan, result)
        outcome = sums.add(update, plan)
        assert outcome.accepted == (update.status == "ok"), outcome.reason
        updates.append(update)
    return algorithm.apply(algorithm.init(model()), sums.sums(), updates), updates


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
        HFedMoE(population(f"aggregation.tau={tau}", "aggregation.participation=false")).client(
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
    update = HFedMoE(facts).client(plan_for(client), result_for(client))
    assert update.expert_weight_LE[layer, expert] == (0 if participation else WEIGHTS[client])
    assert update.expert_weight_LE[layer, 1] == WEIGHTS[client]


def test_uniform_weighting_counts_every_client_alike() -> None:
    update = HFedMoE(population("aggregation.weighting=uniform")).client(plan_for(2), result_for(2))
    assert update.sample_weight == 1
    assert set(np.unique(update.expert_weight_LE)) == {0.0, 1.0}


def test_the_automatic_gate_follows_the_mode() -> None:
    for mode, gate in (("compact", "row-wise"), ("backward-masked", "normalised")):
        automatic, named = (
            HFedMoE(population(f"selection.mode={mode}", f"aggregation.gate={word}")).client(plan_for(0), result_for(0))
            for word in ("auto", gate)
        )
        np.testing.assert_array_equal(automatic.router_weight_LE, named.router_weight_LE)


@pytest.mark.parametrize("name", ["hfedmoe", "random", "fedavg"])
def test_inv11_a_failed_client_reports_and_weighs_nothing(name: str) -> None:
    facts = population()
    algorithm = find_algorithm(name, facts)
    failed = LocalResult({}, None, Cost(flops=3.0), (), "failed", "loss is nan at step 1")
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


MEMORY = CostModel.of(population().spec, tokens=64).predict(TRAINED[0], TRAINED[0], local_steps=1).memory_bytes
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
