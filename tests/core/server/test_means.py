"""Every rule of aggregation is the equation it names, and leaves alone what it should (invariant 9)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from update_cases import (
    ALL,
    EXPERTS,
    Client,
    accumulate,
    make_clients,
    make_plan,
    make_specs,
    make_state,
    make_update,
    quantized,
)

from fedmoe_core.messages.plan import ExpertPlan
from fedmoe_core.messages.update import ClientUpdate
from fedmoe_core.model.spec import ParamSpec, model_hash
from fedmoe_core.server.accumulator import Accumulator
from fedmoe_core.server.means import GateRule, Sums, dense_mean, expert_mean, gate_mean


def scatter(delta: Tensor, plan: ExpertPlan, layer: int) -> Tensor:
    """(Bt, ...) rows to (E, ...) float64, one expert at a time: the plain form of what the Accumulator does."""
    full = torch.zeros(EXPERTS, *delta.shape[1:], dtype=torch.float64)
    rows = [e for e in range(EXPERTS) if plan.trainable_LE[layer, e]]
    for place, expert in enumerate(rows):
        full[expert] = delta[place].double()
    return full


def assert_same(got: Tensor, want_f64: Tensor, tolerance: float = 1e-9) -> None:
    """Relative L2 distance; 1e-9 is 2^-36 resolution against deltas of 0.1 with room for a few clients."""
    error = float((got.double() - want_f64).norm() / want_f64.norm())
    assert error < tolerance, error


def in_double(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model in float64, so that a mean is compared before the cast to float32 (6e-8) would hide errors."""
    return {key: value.double() for key, value in state.items()}


def plain_fedavg(clients: list[Client], state: dict[str, Tensor], key: str, layer: int) -> Tensor:
    """sum_c |D_c| theta_c / sum_c |D_c| in float64, from the clients' whole models."""
    total, weight = torch.zeros(state[key].shape, dtype=torch.float64), 0.0
    for update, plan in clients:
        delta = update.deltas[key].double() if layer < 0 else scatter(update.deltas[key], plan, layer)
        total += quantized(update.sample_weight) * (state[key].double() + delta)
        weight += quantized(update.sample_weight)
    return total / weight


def as_samples(clients: list[Client]) -> list[Client]:
    """Every weight of every client is its sample weight, wherever it trained."""
    return [
        (
            replace(
                update,
                expert_weight_LE=update.sample_weight * plan.trainable_LE,
                router_weight_LE=update.sample_weight * plan.trainable_LE,
                gate_weight=update.sample_weight,
            ),
            plan,
        )
        for update, plan in clients
    ]


@pytest.mark.parametrize("seed", range(5))
def test_inv9_full_budget_equals_plain_fedavg(seed: int) -> None:
    clients = as_samples(make_clients(5, seed, full=True))
    sums, state = accumulate(clients).sums(), in_double(make_state(seed))
    gate: tuple[GateRule, ...] = ("row-wise", "normalized", "fedavg")
    new = [{**expert_mean(sums, state, rule), **dense_mean(sums, state)} for rule in ("participation", "damped")]
    new = [{**means, **gate_mean(sums, state, rule)} for means in new for rule in gate]
    for spec in make_specs():
        want = plain_fedavg(clients, state, spec.key, spec.layer)
        for means in new:
            assert_same(means[spec.key], want)
            assert torch.equal(means[spec.key], new[0][spec.key])


def test_inv9_full_budget_equals_the_dense_path_bit_for_bit() -> None:
    """The same numbers sent as an expert, as a router and as a dense tensor come out with the same bits."""
    shape = (EXPERTS, 6, 4)
    specs = [
        ParamSpec("moe.0.w_in", "expert", shape, torch.float32, 0),
        ParamSpec("moe.0.router", "router", shape, torch.float32, 0),
        ParamSpec("dense.same", "dense", shape, torch.float32),
    ]
    old = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    accumulator = Accumulator(specs, train_dense=True)
    mask = np.ones((1, EXPERTS), dtype=bool)
    for client in range(6):
        delta = 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(client))
        sample = (client + 1) / 6
        plan = make_plan(mask, client=client)
        update = replace(
            ClientUpdate(client, 0, plan.id, {}, sample * mask, sample * mask, sample, sample, None, plan.predicted, 1),
            deltas={spec.key: delta for spec in specs},
        )
        assert accumulator.add(update, plan).accepted
    sums, state = accumulator.sums(), {spec.key: old for spec in specs}
    dense = dense_mean(sums, state)["dense.same"]
    assert not torch.equal(dense, old)
    for expert_rule in ("participation", "damped"):
        assert torch.equal(expert_mean(sums, state, expert_rule)["moe.0.w_in"], dense)
    for gate_rule in ("row-wise", "normalized", "fedavg"):
        assert torch.equal(gate_mean(sums, state, gate_rule)["moe.0.router"], dense)


@settings(max_examples=30, deadline=None)
@given(order=st.permutations(range(5)), seed=st.integers(0, 1000))
def test_inv9_permuting_clients_changes_no_bit_of_the_model(order: list[int], seed: int) -> None:
    clients, state = make_clients(5, seed), make_state(seed)

    def model(sums: Sums) -> str:
        gate = gate_mean(sums, state, "normalized")
        return model_hash({**state, **expert_mean(sums, state, "damped"), **gate, **dense_mean(sums, state)})

    assert model(accumulate(clients).sums()) == model(accumulate([clients[i] for i in order]).sums())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_inv9_untouched_expert_is_bit_identical(dtype: torch.dtype) -> None:
    """Untrained, or trained with weight 0: the bits stay, minus zero and denormals included."""
    trained = np.array([[0, 1, 1, 0, 0], [0, 0, 0, 0, 0]], dtype=bool)
    state = make_state(1, dtype)
    for value in state.values():
        value.view(-1)[0] = -0.0
    plan = make_plan(trained)
    update = make_update(plan, train_dense=True, dtype=dtype)
    update.expert_weight_LE[0, 2] = update.router_weight_LE[0, 2] = 0.0
    accumulator = Accumulator(make_specs(dtype), train_dense=True)
    assert accumulator.add(update, plan).accepted
    sums = accumulator.sums()
    results = [expert_mean(sums, state, rule) for rule in ("participation", "damped")]
    results += [gate_mean(sums, state, rule) for rule in ("row-wise", "normalized", "fedavg")]
    for new in results:
        for key, value in new.items():
            layer = int(key.split(".")[1])
            assert value.dtype == dtype
            for expert in range(EXPERTS):
                same = model_hash({"row": value[expert]}) == model_hash({"row": state[key][expert]})
                assert same == ((layer, expert) != (0, 1)), (key, expert)


def test_inv9_empty_round_keeps_every_bit() -> None:
    state = make_state()
    sums = accumulate([]).sums()
    new = {**expert_mean(sums, state), **gate_mean(sums, state, "literal", s_global_size=3), **dense_mean(sums, state)}
    assert model_hash(new) == model_hash(state)
    assert all(new[key] is not state[key] for key in state)


def by_hand(clients: list[Client], state: dict[str, Tensor], key: str, weight_name: str) -> tuple[Tensor, Tensor]:
    """sum_c w_c[e] delta_c[e] and sum_c w_c[e], in float64, one client and one expert at a time."""
    layer = int(key.split(".")[1])
    numerator, den_E = torch.zeros(state[key].shape, dtype=torch.float64), torch.zeros(EXPERTS, dtype=torch.float64)
    for update, plan in clients:
        if key in update.deltas:
            delta = scatter(update.deltas[key], plan, layer)
            for expert in range(EXPERTS):
                weight = quantized(float(getattr(update, weight_name)[layer, expert]))
                numerator[expert] += weight * delta[expert]
                den_E[expert] += weight
    return numerator, den_E


@pytest.mark.parametrize("seed", range(3))
def test_expert_rules_follow_their_equations(seed: int) -> None:
    clients, state = make_clients(4, seed), in_double(make_state(seed))
    sums = accumulate(clients).sums()
    mean, damped = expert_mean(sums, state), expert_mean(sums, state, "damped")
    round_weight = sum(quantized(update.sample_weight) for update, _ in clients)
    for spec in make_specs():
        if spec.kind == "expert":
            numerator, den_E = by_hand(clients, state, spec.key, "expert_weight_LE")
            safe_E11 = torch.where(den_E == 0, 1.0, den_E).view(-1, 1, 1)
            assert_same(mean[spec.key], state[spec.key] + numerator / safe_E11)
            assert_same(damped[spec.key], state[spec.key] + numerator / round_weight)


@pytest.mark.parametrize("seed", range(3))
def test_gate_rules_follow_eqs_18_to_21(seed: int) -> None:
    """Row-wise has its own weights; the other rules take one weight a client, and average whole routers."""
    s_global = 3.0
    clients, state = make_clients(4, seed), in_double(make_state(seed))
    row_wise = gate_mean(accumulate(clients).sums(), state)
    alike = [
        (replace(update, router_weight_LE=update.gate_weight * plan.trainable_LE), plan) for update, plan in clients
    ]
    sums = accumulate(alike).sums()
    normalized = gate_mean(sums, state, "normalized")
    literal = gate_mean(sums, state, "literal", s_global_size=s_global)
    fedavg = gate_mean(accumulate(as_samples(clients)).sums(), state, "fedavg")
    alphas = [quantized(update.gate_weight) / s_global for update, _ in clients]
    shares = [quantized(update.sample_weight) for update, _ in clients]
    assert abs(sum(alphas) - 1) > 0.05  # otherwise literal and normalised would be the same
    for key in ("moe.0.router", "moe.1.router"):
        layer, old = int(key.split(".")[1]), state[key]
        numerator, den_E = by_hand(clients, state, key, "router_weight_LE")
        assert_same(row_wise[key], old + numerator / torch.where(den_E == 0, 1.0, den_E).view(-1, 1))
        routers = [
            old + (scatter(update.deltas[key], plan, layer) if key in update.deltas else 0) for update, plan in clients
        ]
        printed = sum(alpha * router for alpha, router in zip(alphas, routers, strict=True))
        averaged = sum(share * router for share, router in zip(shares, routers, strict=True)) / sum(shares)
        assert_same(literal[key], printed)
        assert_same(normalized[key], printed / sum(alphas))
        assert_same(fedavg[key], averaged)


def test_gate_rules_refuse_what_they_cannot_do() -> None:
    sums, state = accumulate(make_clients(2)).sums(), make_state()
    for size in (None, 0, -1, float("nan")):
        with pytest.raises(ValueError, match="s_global_size > 0"):
            gate_mean(sums, state, "literal", s_global_size=size)
    with pytest.raises(ValueError, match="use one of row-wise, normalized, literal, fedavg"):
        gate_mean(sums, state, "mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="use one of participation, damped"):
        expert_mean(sums, state, "fedavg")  # type: ignore[arg-type]


def test_frozen_trunk_has_no_sum() -> None:
    accumulator = Accumulator(make_specs())
    plan = make_plan(ALL)
    accumulator.add(make_update(plan), plan)
    sums, state = accumulator.sums(), make_state()
    assert dense_mean(sums, state) == {}
    assert (sums.dense_den, sums.round_den > 0) == (0, True)
    assert not any(key.startswith("dense") for key in sums.numerators)
