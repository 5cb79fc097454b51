"""HFedMoE's weights and averages against a plain re-statement of eqs. 3-5 and 14-21, on clients made by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedmoe_core.adapter import ModelSpec
from fedmoe_core.aggregate import Accumulator, SumSettings
from fedmoe_core.algorithms import NAMES, find_algorithm
from fedmoe_core.algorithms.baselines import FedAvg, RandomExperts
from fedmoe_core.algorithms.hfedmoe import HFedMoE
from fedmoe_core.budget import Budget, Cost
from fedmoe_core.client import LocalResult
from fedmoe_core.config import ALGORITHMS, Config
from fedmoe_core.costs import CostModel
from fedmoe_core.plan import ExpertPlan
from fedmoe_core.state import Population, pack_state, unpack_state
from fedmoe_core.update import ClientProfile, ParamSpec

L, E, H, INNER, T = 2, 4, 3, 2, 50
SAMPLES = np.array([100, 300, 600])
HELD = np.array(
    [
        [[1, 1, 0, 0], [1, 0, 0, 0]],
        [[1, 0, 1, 0], [1, 1, 0, 0]],
        [[1, 1, 1, 0], [1, 1, 1, 0]],  # expert 3 is nobody's
    ],
    dtype=bool,
)
SHAPES = {"router": (E, H), "w_in": (E, 2 * INNER, H), "w_out": (E, H, INNER)}


def specs():
    kinds = {"router": "router", "w_in": "expert", "w_out": "expert"}
    return tuple(
        ParamSpec(f"moe.{layer}.{name}", kinds[name], shape, torch.float32, layer)
        for layer in range(L)
        for name, shape in SHAPES.items()
    )


def profile(client, held_LE):
    """Router sums of T tokens with softmax probabilities, and importance where held."""
    rng = np.random.default_rng(client)
    G_TLE = rng.dirichlet(np.full(E, 0.5), size=(T, L))
    rows_LE = np.where(held_LE, rng.integers(0, 9, (L, E)), 0)
    zeros_LE = np.zeros((L, E))
    return ClientProfile(
        tokens_L=np.full(L, float(T)),
        hits_LE=np.stack([np.bincount(G_TLE[:, layer].argmax(1), minlength=E) for layer in range(L)]).astype(float),
        prob_sum_LE=G_TLE.sum(0),
        prob_max_LE=G_TLE.max(0),
        plogp_sum_LE=(G_TLE * np.log(G_TLE)).sum(0),
        lost_mass_L=np.zeros(L),
        rows_LE=rows_LE.astype(float),
        taylor_LE=zeros_LE,
        taylor_abs_LE=rng.uniform(size=(L, E)) * (rows_LE > 0),
        fisher_LE=zeros_LE,
        grad_sq_LE=zeros_LE,
        held_LE=held_LE,
    )


def population(*overrides, budgets=("unlimited",)):
    config = Config.load(None, ["clients=3", "threads=1", *overrides])
    spec = ModelSpec("made", "causal_lm", L, E, 2, H, INNER, "swiglu", specs())
    costs = CostModel(num_layers=L, num_experts=E, top_k=2, hidden_size=H, intermediate_size=INNER, tokens=16)
    tiers = tuple(Budget.parse(budgets[c % len(budgets)], spec_experts=L * E) for c in range(3))
    return Population(config, spec, tiers, costs, SAMPLES, profile(99, np.ones((L, E), dtype=bool)))


def params(seed=7):
    generator = torch.Generator().manual_seed(seed)
    return {spec.key: torch.randn(spec.shape, generator=generator) for spec in specs()}


def plan_of(client):
    return ExpertPlan(client, 0, HELD[client], HELD[client], 2, 1, 0, Budget(), Cost())


def result_of(client):
    generator = torch.Generator().manual_seed(100 + client)
    deltas = {}
    for spec in specs():
        rows = int(HELD[client, spec.layer].sum())
        deltas[spec.key] = 0.1 * torch.randn((rows, *spec.shape[1:]), generator=generator)
    return LocalResult(deltas, profile(client, HELD[client]), Cost(), (1.0, 0.9))


def play(algorithm, state):
    """Three clients through the real Accumulator and apply."""
    sums = Accumulator(specs(), SumSettings(weight_bits=20, max_clients=3))
    updates = [algorithm.client(plan_of(client), result_of(client)) for client in range(3)]
    for client, update in enumerate(updates):
        outcome = sums.add(update, plan_of(client))
        assert outcome.accepted, outcome.reason
    return algorithm.apply(state, sums.sums(), updates), updates


def scattered(client, key):
    """A client's delta in the full shape, float64."""
    spec = next(spec for spec in specs() if spec.key == key)
    full = np.zeros(spec.shape)
    full[np.flatnonzero(HELD[client, spec.layer])] = result_of(client).deltas[key].double().numpy()
    return full


def restated(old, *, gate, experts, tau, lam, participation):
    """Eqs. 5 and 16-21 in loops, with the readings that the docstrings name."""
    profiles = [profile(client, HELD[client]) for client in range(3)]
    u = [p.prob_sum_LE / T for p in profiles]  # (16)
    s = [lam * p.prob_sum_LE / T + (1 - lam) * p.prob_max_LE for p in profiles]  # (5)
    S = [(u[c] >= tau) & HELD[c] for c in range(3)]  # (18), cut to what is held
    alpha = [(u[c] * s[c])[S[c]].sum() for c in range(3)]  # (19), (20) without 1/|S_global|
    size = (S[0] | S[1] | S[2]).sum()
    new = {}
    for spec in specs():
        value = old[spec.key].double().numpy().copy()
        for e in range(E):
            weights, pull = [], np.zeros(spec.shape[1:])
            for c in range(3):
                if spec.kind == "expert":
                    votes = S[c][spec.layer, e] and (profiles[c].rows_LE[spec.layer, e] > 0 or not participation)
                    w = SAMPLES[c] * votes  # (17)
                elif gate == "row-wise":
                    w = (u[c] * s[c] * S[c])[spec.layer, e]
                elif gate == "fedavg":
                    w = SAMPLES[c] * HELD[c, spec.layer, e]
                else:
                    w = alpha[c] * HELD[c, spec.layer, e]
                weights.append(w)
                pull += w * scattered(c, spec.key)[e]
            below = sum(weights)
            if below > 0 and (
                (spec.kind == "expert" and experts == "damped") or (spec.kind == "router" and gate == "fedavg")
            ):
                below = SAMPLES.sum()
            if below > 0 and spec.kind == "router" and gate == "normalised":
                below = sum(alpha)
            if spec.kind == "router" and gate == "literal":
                value[e] = sum(alpha) / size * value[e] + pull / size  # (21) as printed
            elif below > 0:
                value[e] = value[e] + pull / below
        new[spec.key] = value
    return new


@pytest.mark.parametrize("gate", ["row-wise", "normalised", "literal", "fedavg"])
@pytest.mark.parametrize("experts", ["participation", "damped"])
@pytest.mark.parametrize(("tau", "participation"), [(0.0, True), (0.25, True), (0.0, False)])
def test_eqs_16_to_21_against_a_plain_restatement(gate, experts, tau, participation):
    words = [f"aggregation.gate={gate}", f"aggregation.experts={experts}", f"aggregation.tau={tau}"]
    algorithm = HFedMoE(
        population(*words, f"aggregation.participation={str(participation).lower()}", "selection.lam=0.3")
    )
    state = algorithm.init(params())
    after, _ = play(algorithm, state)
    want = restated(params(), gate=gate, experts=experts, tau=tau, lam=0.3, participation=participation)
    for key, value in want.items():
        error = np.linalg.norm(after.params[key].double().numpy() - value) / np.linalg.norm(
            value - params()[key].numpy()
        )
        assert error < 1e-4, key  # weights are rounded to 2^-20


def test_inv9_an_expert_without_votes_keeps_its_bits():
    algorithm = HFedMoE(population())
    after, _ = play(algorithm, algorithm.init(params()))
    for layer in range(L):
        for name in SHAPES:
            assert torch.equal(after.params[f"moe.{layer}.{name}"][3], params()[f"moe.{layer}.{name}"][3])


@pytest.mark.parametrize("gate", ["row-wise", "normalised", "literal"])
def test_a_zero_sum_keeps_the_gate(gate):
    algorithm = HFedMoE(population("aggregation.tau=1.0", f"aggregation.gate={gate}"))  # nobody passes
    state = algorithm.init(params())
    after, _ = play(algorithm, state)
    assert all(torch.equal(after.params[key], value) for key, value in params().items())


def test_scores_are_eqs_5_and_14():
    p = profile(1, HELD[1])
    mean, largest = p.prob_sum_LE / T, p.prob_max_LE
    s = 0.3 * mean + 0.7 * largest
    kl = p.plogp_sum_LE / T - mean * np.log(mean)
    for score, want in {"s": s, "ib": s - 2.0 * kl}.items():
        algorithm = HFedMoE(population(f"selection.score={score}", "selection.lam=0.3", "selection.beta=2.0"))
        state = replace(algorithm.init(params()), profiles=(None, p, None))
        np.testing.assert_allclose(algorithm.scores(state)[1], want, rtol=1e-12)


def test_taylor_of_an_absent_expert_is_own_demand_times_what_others_measured():
    algorithm = HFedMoE(population("selection.score=taylor", "selection.beta=0"))
    p = [profile(client, HELD[client]) for client in range(3)]
    prior = algorithm.population.prior
    scores = algorithm.scores(replace(algorithm.init(params()), profiles=tuple(p)))
    worth, hits = prior.taylor_abs_LE.copy(), prior.rows_LE.copy()
    for q in p:  # what a served row was worth, weighed by the demand of whoever measured it
        seen = q.rows_LE > 0
        worth += np.where(seen, q.taylor_abs_LE / np.maximum(q.rows_LE, 1) * q.hits_LE, 0)
        hits += np.where(seen, q.hits_LE, 0)
    fleet = worth / hits
    own = p[0].taylor_abs_LE / np.maximum(p[0].rows_LE, 1)
    value = np.where(p[0].rows_LE > 0, own, fleet) * p[0].hits_LE
    np.testing.assert_allclose(scores[0], value / value.sum(axis=1, keepdims=True), rtol=1e-9)


def test_random_experts_fill_the_same_budget_and_are_redrawn():
    ours = HFedMoE(population("selection.explore=0", budgets=("experts=4",)))
    theirs = RandomExperts(ours.population)
    state = theirs.init(params())
    first, again = theirs.plan(state, range(3)), theirs.plan(state, range(3))
    later = theirs.plan(replace(state, round=1), range(3))
    for plan, same, chosen in zip(first, again, ours.plan(state, range(3)), strict=True):
        assert (plan.permitted_LE == same.permitted_LE).all()
        assert plan.predicted.bytes_up == chosen.predicted.bytes_up
        assert plan.predicted.experts == 4
    assert any((plan.permitted_LE != other.permitted_LE).any() for plan, other in zip(first, later, strict=True))


def test_fedavg_plans_everything_and_is_charged_for_it():
    algorithm = FedAvg(population(budgets=("experts=2",)))
    (plan,) = algorithm.plan(algorithm.init(params()), [0])
    assert plan.permitted_LE.all()
    assert algorithm.population.budgets[0].violations(plan.predicted)


def test_a_failed_client_reports_its_reason_and_weighs_nothing():
    failed = LocalResult({}, None, Cost(seconds=1.0), (), status="failed", error="the loss became nan")
    for kind in (HFedMoE, FedAvg, RandomExperts):
        update = kind(population()).client(plan_of(0), failed)
        assert update.status == "failed"
        assert update.error == "the loss became nan"
        assert update.expert_weight_LE.sum() == update.gate_weight == 0


def test_every_name_of_the_configuration_is_an_algorithm():
    assert set(NAMES) == set(ALGORITHMS)
    for name in NAMES:
        assert find_algorithm(name, population()).init(params()).round == 0
    with pytest.raises(ValueError, match="did you mean 'hfedmoe'"):
        find_algorithm("hfedmo", population())


def test_state_survives_packing():
    algorithm = HFedMoE(population())
    state, _ = play(algorithm, algorithm.init(params()))
    back = unpack_state(pack_state(state), round=state.round)
    assert back.visits == state.visits == (1, 1, 1)
    assert all(torch.equal(back.params[key], value) for key, value in state.params.items())
    for ours, theirs in zip(back.profiles, state.profiles, strict=True):
        assert ours is not None
        np.testing.assert_array_equal(ours.prob_sum_LE, theirs.prob_sum_LE)
        np.testing.assert_array_equal(ours.held_LE, theirs.held_LE)
