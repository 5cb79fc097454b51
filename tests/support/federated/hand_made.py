"""Three clients made by hand, two layers of four experts, and one round as the simulator plays it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmoe_core.algorithms.base import Algorithm, algorithm_class
from fedmoe_core.algorithms.baselines import FedAvg
from fedmoe_core.budget.from_spec import cost_model_of
from fedmoe_core.budget.limits import Budget, Cost
from fedmoe_core.config.run_config import Config
from fedmoe_core.messages.plan import NO_EXTRAS, ExpertPlan, Extras
from fedmoe_core.messages.profile import ClientProfile
from fedmoe_core.messages.result import LocalFailure, LocalResult
from fedmoe_core.messages.update import ClientUpdate
from fedmoe_core.model.spec import ModelSpec, ParamSpec
from fedmoe_core.server.accumulator import Accumulator
from fedmoe_core.server.fixed_point import SumSettings
from fedmoe_core.server.state import Population, ServerState

LAYERS, EXPERTS, HIDDEN, INNER, TOP_K = 2, 4, 3, 5, 2
TOKENS = (40, 23, 31)  # of each client, all different
SAMPLES = np.array([100, 50, 25])
WEIGHTS = SAMPLES / SAMPLES.max()
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
        reap_sum_LE=rng.uniform(0.1, 1, held_LE.shape) * rows_LE,
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
        costs=cost_model_of(spec, tokens=64),
        samples_C=SAMPLES,
        prior=PRIOR,
    )


def model(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {spec.key: torch.randn(spec.shape, generator=generator, dtype=torch.float64) for spec in specs()}


def plan_for(client: int) -> ExpertPlan:
    return ExpertPlan(client, 0, HELD[client], TRAINED[client], TOP_K, 2, 0, Budget(), Cost())


def whole(plan: ExpertPlan, result: LocalResult | LocalFailure) -> tuple[ExpertPlan, LocalResult | LocalFailure]:
    """The same as FedAvg would have it: every expert trained, by nothing where the client's own delta has no row."""
    plan = replace(plan, permitted_LE=EVERY_LE, trainable_LE=EVERY_LE)
    if isinstance(result, LocalFailure):
        return plan, result
    full = {key: torch.from_numpy(spread(plan.client, key)) for key in result.deltas}
    return plan, replace(result, deltas=full, profile=replace(result.profile, held_LE=EVERY_LE))


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


def find_algorithm(name: str, facts: Population) -> Algorithm:
    return algorithm_class(name)(facts)


def play(
    algorithm: Any,
    results: list[LocalResult | LocalFailure] | None = None,
    *,
    asked: Mapping[int, Extras] = MappingProxyType({}),
) -> tuple[ServerState, list[ClientUpdate]]:
    """One round as the simulator plays it: client, checked exact sums, apply; ``asked``: what of whom besides."""
    facts: Population = algorithm.population
    rule = facts.config.aggregation
    settings = SumSettings(rule.scale_bits, rule.value_bound, rule.norm_bound, rule.weight_bits, max_clients=3)
    sums = Accumulator(facts.spec.params, settings, lr=facts.config.train.lr)
    updates = []
    for client, result in enumerate(results or [result_for(client) for client in range(3)]):
        plan = replace(plan_for(client), extras=asked.get(client, NO_EXTRAS))
        if isinstance(algorithm, FedAvg):
            plan, result = whole(plan, result)
        update = algorithm.answer(plan, result)
        outcome = sums.add(update, plan)
        assert outcome.accepted == (update.status == "ok"), outcome.reason
        updates.append(update)
    return algorithm.advance(algorithm.init(model()), sums.sums(), updates), updates
