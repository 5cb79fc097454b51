"""The sums are exact and order-free (invariant 13), and record what was summed."""

from __future__ import annotations

import itertools
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from update_cases import (
    ALL,
    EXPERTS,
    SHAPE_LE,
    accumulate,
    clone_update,
    make_clients,
    make_plan,
    make_specs,
    make_state,
    make_update,
    quantized,
)

from fedmoe_core.messages.update import ClientUpdate
from fedmoe_core.model.spec import ParamSpec, model_hash
from fedmoe_core.server.accumulator import Accumulator
from fedmoe_core.server.fixed_point import SumSettings
from fedmoe_core.server.means import dense_mean, expert_mean, gate_mean


@settings(max_examples=50, deadline=None)
@given(data=st.data(), count=st.integers(1, 7), seed=st.integers(0, 2**16))
def test_inv13_any_order_and_any_grouping_give_the_same_bits(data: st.DataObject, count: int, seed: int) -> None:
    clients = make_clients(count, seed)
    straight = accumulate(clients).flatten()
    order = data.draw(st.permutations(clients))
    ranks = data.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    groups = [accumulate([c for c, rank in zip(order, ranks, strict=True) if rank == r]) for r in range(4)]

    tree = data.draw(st.permutations(groups))
    merged = Accumulator(make_specs(), train_dense=True)
    for group in tree:
        merged.merge(group)
    assert torch.equal(merged.flatten(), straight)
    assert merged.accepted == count

    assert torch.equal(torch.stack([group.flatten() for group in groups]).sum(0), straight)


def test_inv13_float32_sums_would_depend_on_order() -> None:
    """The reason for integers: the same clients, summed as float32, differ between orders."""
    deltas = [update.deltas["dense.head"] for update, _ in make_clients(6)]
    results = {sum(order).numpy().tobytes() for order in itertools.islice(itertools.permutations(deltas), 50)}
    assert len(results) > 1


@settings(max_examples=200, deadline=None)
@given(
    scale_bits=st.integers(1, 62),
    weight_bits=st.integers(1, 30),
    value_bound=st.floats(1e-6, 1e6),
    max_clients=st.integers(1, 10**6),
)
def test_inv13_settings_that_exist_cannot_overflow(
    scale_bits: int, weight_bits: int, value_bound: float, max_clients: int
) -> None:
    """Python integers as the judge: every setting that is accepted holds max_clients updates at the very bound."""
    try:
        format_ = SumSettings(scale_bits, value_bound, 100.0, weight_bits, max_clients)
    except ValueError:
        return  # refused settings are the next tests' business
    largest = torch.tensor([[value_bound]], dtype=torch.float64)
    total = torch.zeros(1, 1, dtype=torch.int64)
    spec = ParamSpec("moe.0.w", "expert", (1, 1), torch.float64, 0)
    accumulator = Accumulator([spec], format_)
    plan = make_plan(np.ones((1, 1), dtype=bool))
    update = ClientUpdate(
        0, 0, plan.id, {"moe.0.w": largest}, np.ones((1, 1)), np.ones((1, 1)), 1.0, 1.0, None, plan.predicted, 1
    )
    assert accumulator.add(update, plan).accepted == (value_bound <= format_.norm_bound)
    if accumulator.accepted:
        total = accumulator.sums().numerators["moe.0.w"]
        assert int(total) > 0
        assert int(total) * max_clients < 2**63
    assert format_.largest_sum < 2**63


def test_inv13_sum_of_clients_at_the_bound_is_right_up_to_the_last_client() -> None:
    """36 + 24 + 2 bits leave one bit of 63: three clients at the bound, all weights 1, sum without wrapping."""
    format_ = SumSettings(scale_bits=36, weight_bits=24, max_clients=3)
    accumulator = Accumulator(make_specs(), format_, train_dense=True)
    for client in range(3):
        plan = make_plan(ALL, client=client)
        update = make_update(plan, train_dense=True)
        ones = {key: torch.ones_like(delta) for key, delta in update.deltas.items()}
        weights = {"expert_weight_LE": np.ones(SHAPE_LE), "router_weight_LE": np.ones(SHAPE_LE)}
        assert accumulator.add(
            replace(update, deltas=ones, sample_weight=1.0, gate_weight=1.0, **weights), plan
        ).accepted
    expected = 3 * (2**24 - 1) * 2**36
    for numerator in accumulator.sums().numerators.values():
        assert bool((numerator == expected).all())
    state = make_state()
    for key, new in expert_mean(accumulator.sums(), state).items():
        assert torch.equal(new, (state[key].double() + 1.0).float())
    plan = make_plan(ALL, client=3)
    assert "the sums are full: max_clients is 3" in accumulator.add(make_update(plan, train_dense=True), plan).reason


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"scale_bits": 44}, "lower scale_bits to 40"),  # 2^40 * 2^12 * 1024 = 2^62
        ({"max_clients": 1 << 20}, "max_clients to 32767"),  # 2^48 * 32767 < 2^63 = 2^48 * 32768
        ({"weight_bits": 30}, "lower scale_bits to 22"),
        ({"value_bound": 1e6}, "lower scale_bits to 21"),
        ({"value_bound": 0.0}, "value_bound = 0.0 is not a positive"),
        ({"norm_bound": float("nan")}, "norm_bound = nan is not a positive"),
        ({"scale_bits": 3.5}, "scale_bits = 3.5 is not a whole number"),
        ({"max_clients": 0}, "max_clients = 0 is not a whole number"),
        ({"scale_bits": 8, "value_bound": 0.001}, "value_bound = 0.001 is not above 2^-8"),
    ],
)
def test_inv13_impossible_settings_name_the_remedy(fields: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError) as caught:
        SumSettings(**fields)  # type: ignore[arg-type]
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "fields", [{"scale_bits": 50}, {"weight_bits": 30}, {"value_bound": 1.99999999}, {"max_clients": 10**7}]
)
def test_inv13_the_named_remedy_works(fields: dict[str, float]) -> None:
    with pytest.raises(ValueError) as caught:
        SumSettings(**fields, **({} if "max_clients" in fields else {"max_clients": 20_000}))  # type: ignore[arg-type]
    words = str(caught.value).split()
    bits = int(words[words.index("scale_bits") + 2])
    SumSettings(**{"max_clients": 20_000, **fields, "scale_bits": bits})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="past the 2"):
        SumSettings(**{"max_clients": 20_000, **fields, "scale_bits": bits + 1})  # type: ignore[arg-type]


def test_inv13_resolution_is_below_a_thousandth_of_the_learning_rate() -> None:
    assert Accumulator(make_specs(), lr=2e-3).settings.resolution < 2e-6
    with pytest.raises(ValueError, match="raise scale_bits to at least 19"):  # 2^-19 < 2e-6 < 2^-18
        Accumulator(make_specs(), SumSettings(scale_bits=18), lr=2e-3)
    Accumulator(make_specs(), SumSettings(scale_bits=19), lr=2e-3)
    with pytest.raises(ValueError, match="not positive"):
        Accumulator(make_specs(), lr=0.0)


@settings(max_examples=200, deadline=None)
@given(weight=st.floats(0, 1), bits=st.integers(1, 30))
def test_inv13_weights_are_integers_that_keep_zero_one_and_presence(weight: float, bits: int) -> None:
    format_ = SumSettings(scale_bits=10, weight_bits=bits, max_clients=1)
    value = int(format_.quantize(weight))
    assert (value == 0) == (weight == 0)
    assert value <= format_.top_weight == int(format_.quantize(1.0))
    assert abs(value / format_.top_weight - weight) <= 1 / format_.top_weight


@pytest.mark.parametrize("size", [1e-1, 1e-6, 1e-11])
def test_inv13_sums_are_within_half_a_unit_a_client_of_exact_rationals(size: float) -> None:
    """Rounded once, after the exact product of weight and delta. A float32 of 0.1 has no bit below the grid, so only
    the small sizes round at all; at 1e-11 a delta is below the grid of 1.5e-11 itself.
    """
    plans = [make_plan(ALL, client=client) for client in range(4)]
    clients = [(make_update(plan, train_dense=True, size=size), plan) for plan in plans]
    numerator = accumulate(clients).sums().numerators["dense.head"].view(-1)
    for place in range(numerator.numel()):
        exact = Fraction(0)
        for update, _ in clients:
            delta = Fraction(float(update.deltas["dense.head"].view(-1)[place]))
            exact += round(quantized(update.sample_weight) * 4095) * delta * 2**36
        assert abs(int(numerator[place]) - exact) <= Fraction(len(clients), 2)


def test_inv13_blocks_do_not_change_the_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    clients = make_clients(3)
    whole = accumulate(clients).flatten()
    for block in (1, 7, 30):  # below one row, below one tensor, several rows
        monkeypatch.setattr("fedmoe_core.server.adding.BLOCK_CPU", block)
        assert torch.equal(accumulate(clients).flatten(), whole)


def test_inv13_strided_and_float64_deltas_sum_like_plain_ones_and_stay_unchanged() -> None:
    specs = make_specs(torch.float64)
    plan = make_plan(ALL)
    update = make_update(plan, train_dense=True, dtype=torch.float64)
    strided = {key: d.mT.contiguous().mT if d.dim() > 1 else d for key, d in update.deltas.items()}
    assert not strided["moe.0.w_in"].is_contiguous()
    kept = clone_update(update)
    one, two = (Accumulator(specs, train_dense=True) for _ in range(2))
    assert one.add(update, plan).accepted
    assert two.add(replace(update, deltas=strided), plan).accepted
    assert torch.equal(one.flatten(), two.flatten())
    assert all(torch.equal(update.deltas[key], kept.deltas[key]) for key in kept.deltas)


def test_inv13_inputs_are_never_mutated() -> None:
    update, plan = make_clients(1, full=True)[0]
    kept, masks = clone_update(update), (plan.trainable_LE.copy(), plan.permitted_LE.copy())
    state = make_state()
    digest = model_hash(state)
    sums = accumulate([(update, plan)]).sums()
    expert_mean(sums, state)
    for rule in ("row-wise", "normalized", "fedavg"):
        gate_mean(sums, state, rule)
    gate_mean(sums, state, "literal", s_global_size=2)
    dense_mean(sums, state)
    assert model_hash(state) == digest
    assert all(torch.equal(update.deltas[key], kept.deltas[key]) for key in kept.deltas)
    assert np.array_equal(update.expert_weight_LE, kept.expert_weight_LE)
    assert np.array_equal(update.router_weight_LE, kept.router_weight_LE)
    assert np.array_equal(plan.trainable_LE, masks[0])
    assert np.array_equal(plan.permitted_LE, masks[1])


def test_sums_record_is_unchanged_by_what_follows() -> None:
    clients = make_clients(3, full=True)
    accumulator = accumulate(clients[:2])
    first = accumulator.sums()
    kept = {key: value.clone() for key, value in first.numerators.items()}
    accumulator.add(*clients[2])
    second = accumulator.sums()
    later = {key: value.clone() for key, value in second.numerators.items()}
    accumulator.add(*make_clients(4, full=True)[3])
    assert all(torch.equal(first.numerators[key], kept[key]) for key in kept)
    assert all(torch.equal(second.numerators[key], later[key]) for key in later)
    assert not any(torch.equal(kept[key], later[key]) for key in kept)
    assert (first.accepted, second.accepted, accumulator.accepted) == (2, 3, 4)
    assert second.round_den > first.round_den


def test_a_client_counts_once() -> None:
    clients = make_clients(2)
    accumulator = accumulate(clients)
    before = accumulator.flatten()
    assert "already in the sums" in accumulator.add(*clients[0]).reason
    assert torch.equal(accumulator.flatten(), before)
    with pytest.raises(ValueError, match="client 1 is in both"):
        accumulator.merge(accumulate(clients[1:]))


def test_merging_what_does_not_fit_is_an_error() -> None:
    accumulator = accumulate(make_clients(2), SumSettings(max_clients=2))
    with pytest.raises(ValueError, match="differ in model or settings"):
        accumulator.merge(accumulate([]))
    other = Accumulator(make_specs(), SumSettings(max_clients=2), train_dense=True)
    plan = make_plan(ALL, client=7)
    other.add(make_update(plan, train_dense=True), plan)
    before = accumulator.flatten()
    with pytest.raises(ValueError, match="3 clients are past max_clients = 2"):
        accumulator.merge(other)
    assert torch.equal(accumulator.flatten(), before)


def test_models_that_cannot_be_summed_are_an_error() -> None:
    specs = make_specs()
    with pytest.raises(ValueError, match="share a key"):
        Accumulator([*specs, specs[0]])
    with pytest.raises(ValueError, match="same number"):
        Accumulator([*specs, replace(specs[0], key="moe.2.router", shape=(6, 3), layer=2)])
    with pytest.raises(ValueError, match="nothing to sum"):
        Accumulator([spec for spec in specs if spec.kind == "dense"])
    deeper, update = make_plan(np.ones((3, EXPERTS), dtype=bool)), make_update(make_plan(ALL))
    with pytest.raises(ValueError, match="plan with the same model"):
        Accumulator(specs).add(update, deeper)


def test_counts_and_denominators_are_sums_over_accepted_clients() -> None:
    clients = make_clients(5)
    accumulator = accumulate(clients)
    refused = replace(make_clients(6)[5][0], status="failed")
    accumulator.add(refused, make_clients(6)[5][1])
    sums = accumulator.sums()
    quantize = sums.settings.quantize
    assert sums.accepted == 5
    voted = sum((update.expert_weight_LE > 0).astype(int) for update, _ in clients)
    assert sums.expert_voters_LE.tolist() == voted.tolist()
    assert sums.round_den == sums.dense_den == sum(int(quantize(update.sample_weight)) for update, _ in clients)
    assert sums.gate_den == sum(int(quantize(update.gate_weight)) for update, _ in clients)
    assert sums.expert_den_LE.tolist() == sum(quantize(update.expert_weight_LE) for update, _ in clients).tolist()
    assert sums.router_den_LE.tolist() == sum(quantize(update.router_weight_LE) for update, _ in clients).tolist()


def test_model_hash_tells_apart_what_differs() -> None:
    """Key, dtype, shape and every byte count; order of insertion and memory layout do not."""
    base = {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(())}
    same = {"b": torch.zeros(()), "a": torch.arange(6.0).view(2, 3).mT.contiguous().mT}
    assert model_hash(base) == model_hash(same)
    others = [
        {"a": base["a"].view(3, 2), "b": base["b"]},
        {"a": base["a"].view(torch.int32), "b": base["b"]},
        {"a": base["a"], "c": base["b"]},
        {"a": base["a"], "b": torch.tensor(-0.0)},
        {"a": base["a"]},
        {"a": base["a"].bfloat16(), "b": base["b"], "empty": torch.zeros(0, 3)},
        {},
    ]
    assert len({model_hash(state) for state in [base, *others]}) == 1 + len(others)


SHARES = (1.0, 2**-0.5, 1 / 3, 0.5)


def test_a_share_scales_the_deltas_and_leaves_the_weights() -> None:
    """FedBuff's s(tau) with the weights of each tensor: sum(w s delta) / sum(w), re-stated in float64."""
    clients, state = make_clients(4, 5), make_state(1, torch.float64)
    sums = Accumulator(make_specs(), SumSettings(scale_bits=40, weight_bits=12, max_clients=8), train_dense=True)
    for (update, plan), share in zip(clients, SHARES, strict=True):
        assert sums.add(update, plan, share=share).accepted
    fresh = accumulate(clients).sums()
    for name in ("expert_den_LE", "router_den_LE", "expert_voters_LE", "router_voters_LE"):
        assert torch.equal(getattr(sums.sums(), name), getattr(fresh, name)), name
    new = {**expert_mean(sums.sums(), state), **gate_mean(sums.sums(), state), **dense_mean(sums.sums(), state)}
    for spec in make_specs():
        top, below = torch.zeros(spec.shape, dtype=torch.float64), torch.zeros(spec.shape, dtype=torch.float64)
        for (update, plan), share in zip(clients, SHARES, strict=True):
            if spec.kind == "dense":
                weight = quantized(update.sample_weight)
                top, below = top + weight * share * update.deltas[spec.key].double(), below + weight
                continue
            weight_LE = update.expert_weight_LE if spec.kind == "expert" else update.router_weight_LE
            for row, expert in enumerate(np.flatnonzero(plan.trainable_LE[spec.layer])):
                weight = quantized(weight_LE[spec.layer, expert])
                top[expert] += weight * share * update.deltas[spec.key][row].double()
                below[expert] += weight
        moved = new[spec.key] - state[spec.key]
        expected = torch.where(below > 0, top / below.clamp(min=1e-30), 0.0)
        assert (moved - expected).norm() <= 1e-10 * expected.norm(), spec.key


def test_a_share_of_one_changes_no_bit_and_bounds_are_those_of_the_whole_delta() -> None:
    ((update, plan),) = make_clients(1, 2)
    plain, same = accumulate([(update, plan)]), Accumulator(make_specs(), train_dense=True)
    assert same.add(update, plan, share=1.0).accepted
    assert torch.equal(plain.flatten(), same.flatten())
    narrow = Accumulator(make_specs(), SumSettings(norm_bound=0.01), train_dense=True)
    assert "above norm_bound 0.01" in narrow.add(update, plan, share=1e-6).reason
    for share in (0.0, -0.5, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"share = .* of client 0's deltas is not above 0 and at most 1"):
            same.add(update, plan, share=share)


def test_a_share_reaches_a_model_of_dense_tensors_whose_deltas_lie_end_to_end() -> None:
    specs = [ParamSpec(f"dense.{name}", "dense", (3, 2), torch.float32) for name in "ab"]
    plan = make_plan(np.zeros((0, 0), dtype=bool))
    flat = torch.linspace(-0.5, 0.5, 12)
    deltas = {"dense.a": flat[:6].view(3, 2), "dense.b": flat[6:].view(3, 2)}
    nothing_LE = np.zeros((0, 0))
    base = replace(make_update(make_plan(ALL)), plan_id=plan.id)
    whole = replace(
        base, deltas=deltas, expert_weight_LE=nothing_LE, router_weight_LE=nothing_LE, gate_weight=0.0, profile=None
    )
    apart = replace(whole, deltas={key: delta.clone() for key, delta in deltas.items()})
    found = []
    for update in (whole, apart):
        sums = Accumulator(specs, train_dense=True)
        assert sums.add(update, plan, share=0.25).accepted
        found.append(dense_mean(sums.sums(), {key: torch.zeros(3, 2) for key in deltas}))
    for key, delta in deltas.items():
        assert torch.equal(found[0][key], found[1][key])
        assert torch.allclose(found[0][key], 0.25 * delta, atol=1e-9)
