"""The cost model against sizes counted by hand, published sizes and a simulated training step."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmoe_core.budget.calibration import calibrated
from fedmoe_core.budget.cost_model import CostModel, TrunkCost
from fedmoe_core.budget.from_spec import cost_model_of
from fedmoe_core.budget.passes import coded
from fedmoe_core.model.spec import Kind, ModelSpec, ParamSpec
from fedmoe_kernels.formats import FORMATS

# The demo's model: every size different, so that a swapped letter shows.
DEMO = CostModel(
    num_layers=3,
    num_experts=5,
    top_k=2,
    hidden_size=8,
    intermediate_size=6,
    tokens=7,
    trunk_params=100,
    trunk=TrunkCost({1: (900, 800, 500, 300), 2: (1900, 1800, 1500, 700)}, buffer_bytes=50, flops_per_token=11.0),
)
SEEDS = st.integers(0, 2**32 - 1)


def masks(seed: int, model: CostModel = DEMO) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    shape = (model.num_layers, model.num_experts)
    permitted_LE = rng.random(shape) < rng.random()
    permitted_LE[np.arange(shape[0]), rng.integers(0, shape[1], shape[0])] = True
    return permitted_LE, permitted_LE & (rng.random(shape) < rng.random())


def test_sizes_counted_by_hand() -> None:
    permitted_LE, trainable_LE = np.zeros((2, 3, 5), dtype=bool)
    permitted_LE[:, 1:3] = True
    trainable_LE[:, 2] = True
    params = 2 * 6 * 8 + 8 * 6  # w_in (2I, H), w_out (H, I)
    weights = 4 * (100 + 3 * 5 * 8 + 6 * params) + 50 + 6 * DEMO.slot_bytes
    state = 3 * 8 * (params + 8)  # 3 trainable experts, each with its router row
    gradient = 3 * 4 * (params + 8)
    stages = [1900, 1800 + gradient // 3, 1500 + 2 * gradient // 3, 700 + gradient]
    assert DEMO.memory(permitted_LE, trainable_LE) == weights + state + max(gradient, *stages)
    assert DEMO.bytes_down(permitted_LE) == 4 * (6 * params + 3 * 5 * 8 + 100)
    assert DEMO.bytes_down(permitted_LE, first_participation=False) == 4 * (6 * params + 3 * 5 * 8)
    statistics = 15 * (12 * 8 + 1) + 3 * 16
    assert DEMO.bytes_up(trainable_LE) == 3 * 4 * (params + 8) + statistics
    rows, fixed = 7 * 2 * 3, 7 * (11 + 6 * 3 * 5 * 8)
    assert DEMO.step_flops(permitted_LE, trainable_LE) == params * (6 * rows / 2 + 4 * rows / 2) + fixed


def test_a_trained_trunk_is_charged_in_memory_and_every_round() -> None:
    trained = replace(DEMO, trunk_trainable=60)
    permitted_LE, trainable_LE = masks(1)
    # Its gradients are part of the measured transients, its optimizer state is not.
    assert trained.memory(permitted_LE, trainable_LE) == DEMO.memory(permitted_LE, trainable_LE) + 60 * 8
    assert trained.bytes_up(trainable_LE) == DEMO.bytes_up(trainable_LE) + 60 * 4
    later = {"first_participation": False}
    assert trained.bytes_down(permitted_LE, **later) == DEMO.bytes_down(permitted_LE, **later) + 60 * 4
    assert trained.bytes_down(permitted_LE) == DEMO.bytes_down(permitted_LE)


def test_fp32_adamw_costs_sixteen_bytes_a_trainable_parameter_and_four_a_frozen_one() -> None:
    bare = replace(DEMO, trunk=TrunkCost(), train_router=False, slot_bytes=0)
    nothing, one = np.zeros((2, 3, 5), dtype=bool)
    one[1, 2] = True
    empty = bare.memory(nothing, nothing)
    assert bare.memory(one, nothing) - empty == 4 * bare.expert_params
    assert bare.memory(one, one) - empty == 16 * bare.expert_params


def test_published_submodel_sizes_of_fedmoe() -> None:
    """FedMoE (arXiv 2408.11304) Table 1, switch-base: 96 and 65 experts over 12 layers are 2.31 and 1.76 GiB [P, D]."""
    model = CostModel(12, 32, 1, hidden_size=768, intermediate_size=3072, tokens=1, gated=False)
    assert model.expert_params == pytest.approx(4.72e6, rel=1e-3)
    trunk = 619_500_000 - 96 * model.expert_params - model.total_experts * 768
    model = replace(model, trunk_params=trunk)
    for experts, gib in ((96, 2.31), (65, 1.76)):
        permitted_LE = np.arange(model.total_experts).reshape(12, 32) < experts
        assert model.bytes_down(permitted_LE) / 2**30 == pytest.approx(gib, abs=0.01)


def test_lora_counts_adapters_per_matrix() -> None:
    lora = replace(DEMO, lora_rank=2, base_bytes=0.5, slot_bytes=0, trunk=TrunkCost())
    per_expert = 2 * (8 + 12) + 2 * (6 + 8)  # a_in (r, H), b_in (2I, r), a_out (r, I), b_out (H, r)
    assert lora.adapter_params == lora.trained_params == per_expert
    nothing, one = np.zeros((2, 3, 5), dtype=bool)
    one[1, 2] = True
    empty = lora.memory(nothing, nothing)
    merged = replace(lora, base_bytes=None)
    alone = merged.memory(one, nothing) - merged.memory(nothing, nothing)
    assert alone == 4 * DEMO.expert_params  # a frozen expert has merged its adapter
    assert merged.memory(one, one) - merged.memory(one, nothing) == 16 * per_expert + 12 * 8
    # In few bits it keeps it: as stored, as laid beside those that train, and with a gradient that is thrown away.
    assert lora.memory(one, nothing) - empty == DEMO.expert_params // 2 + 12 * per_expert
    assert lora.memory(one, one) - empty == DEMO.expert_params // 2 + 16 * per_expert + 12 * 8
    other = one.copy()
    other[1, 3] = True
    beside = lora.memory(other, one) - lora.memory(one, one)
    assert beside == DEMO.expert_params // 2 + (12 + 4) * per_expert  # the one that trains is laid beside it, too
    assert lora.bytes_up(one) - lora.bytes_up(nothing) == 4 * (per_expert + 8)
    assert lora.bytes_down(one) - lora.bytes_down(nothing) == DEMO.expert_params // 2 + 4 * per_expert
    assert lora.bytes_down(one, cached_LE=one) - lora.bytes_down(nothing) == 4 * per_expert
    rows_LE = 3 * one
    base = lora.real_flops(0 * rows_LE, one, tokens=7)
    assert lora.real_flops(rows_LE, one, tokens=7) - base == 3 * (4 * DEMO.expert_params + 6 * per_expert)
    assert lora.real_flops(rows_LE, nothing, tokens=7) - base == 3 * (4 * DEMO.expert_params + 4 * per_expert)


@given(SEEDS, st.booleans(), st.sampled_from([None, 2]), st.booleans())
def test_additive_rows_say_what_memory_and_bytes_say(seed: int, first: bool, rank: int | None, masked: bool) -> None:
    """Solvers see rows, ledgers see memory() and bytes_*(): they must be the same numbers."""
    model = replace(
        DEMO,
        lora_rank=rank,
        trunk_trainable=30,
        trunk=replace(DEMO.trunk, step_bytes=seed % 5000, gradient_copies=seed % 2),
    )
    held_LE, chosen_LE = masks(seed)
    permitted_LE = np.ones_like(chosen_LE) if masked else held_LE
    mode = "backward-masked" if masked else "compact"
    rows = model.rows(mode, top_k=2, first_participation=first)
    used = rows.base_D + (rows.costs_DLE * chosen_LE).sum(axis=(1, 2))
    used += rows.frozen_D * (permitted_LE & ~chosen_LE).sum()
    cost = model.predict(permitted_LE, chosen_LE, local_steps=3, top_k=2, first_participation=first, mode=mode)
    by_name = {name: max(u for n, u in zip(rows.names, used, strict=True) if n == name) for name in rows.names}
    assert by_name == {
        "memory": cost.memory_bytes,
        "down": cost.bytes_down,
        "up": cost.bytes_up,
        "experts": cost.experts,
    }
    assert cost.experts == (chosen_LE if masked else held_LE).sum()
    assert cost.flops == 3 * model.step_flops(permitted_LE, chosen_LE, top_k=2)


@given(SEEDS)
def test_more_experts_never_cost_less(seed: int) -> None:
    permitted_LE, trainable_LE = masks(seed)
    more_LE = permitted_LE | masks(seed + 1)[0]
    plans = [(permitted_LE, trainable_LE), (more_LE, trainable_LE), (more_LE, more_LE)]
    costs = [DEMO.predict(*plan, local_steps=1) for plan in plans]
    for less, more in pairwise(costs):
        assert less.memory_bytes <= more.memory_bytes
        assert less.bytes_down <= more.bytes_down
        assert less.bytes_up <= more.bytes_up
        assert less.flops <= more.flops


class Step:
    """A training step played out as allocations: the ground truth that calibration sees only the peaks of."""

    def __init__(self, model: CostModel, transients: tuple[int, ...], *, router_late: bool = False) -> None:
        self.model, self.transients, self.copies = model, transients, model.trunk.gradient_copies
        self.router_late = router_late  # whether a layer's router has its gradient only after the height of its stage

    def peaks(self, permitted_LE: np.ndarray, trainable_LE: np.ndarray) -> list[int]:
        """Live bytes at the height of each stage, adding up tensor by tensor."""
        model = self.model
        live = 4 * (model.trunk_params + model.total_experts * model.hidden_size) + model.trunk.buffer_bytes
        tensor = 2 * model.intermediate_size * model.hidden_size + model.hidden_size * model.intermediate_size
        for _ in range(int(permitted_LE.sum())):
            live += 4 * tensor + model.slot_bytes
        for _ in range(int(trainable_LE.sum())):
            live += 2 * 4 * (tensor + model.hidden_size)
        heights = [live + self.transients[0]]
        for stage, layer in enumerate(reversed(range(model.num_layers)), start=1):
            gradients = int(trainable_LE[layer].sum()) * 4 * (tensor + model.hidden_size)
            router = int(trainable_LE[layer].sum()) * 4 * model.hidden_size * self.router_late
            heights.append(live + gradients - router + self.transients[stage] + self.copies * gradients)
            live += gradients
        return heights


TRANSIENTS = st.tuples(*[st.integers(0, 20_000)] * 4)


@given(SEEDS, SEEDS, TRANSIENTS, st.integers(0, 1), st.booleans())
def test_inv2_calibrated_on_one_plan_is_exact_on_others(
    seed: int, other: int, transients: tuple[int, ...], copies: int, router_late: bool
) -> None:
    step = Step(replace(DEMO, trunk=replace(DEMO.trunk, gradient_copies=copies)), transients, router_late=router_late)
    model = calibrated(step.model, {2: step.peaks(*masks(seed))}, *masks(seed))
    # The bytes kept per slot of the calibration plan stay in the transients, so that smaller plans are bounded too.
    slack = int(masks(seed)[0].sum()) * DEMO.slot_bytes
    # And the router's rows of the layer that runs: it is not known whether they had their gradients at the height.
    most = max(int(masks(each)[1].sum(axis=1).max()) for each in (seed, other))
    unsure = most * DEMO.hidden_size * DEMO.grad_bytes
    for plan in (masks(seed), masks(other)):
        assert slack <= model.memory(*plan) - max(step.peaks(*plan)) <= slack + unsure


@given(SEEDS, SEEDS, TRANSIENTS, st.integers(0, 1))
def test_inv2_a_single_peak_still_gives_an_upper_bound(
    seed: int, other: int, transients: tuple[int, ...], copies: int
) -> None:
    step = Step(replace(DEMO, trunk=replace(DEMO.trunk, gradient_copies=copies)), transients)
    model = calibrated(step.model, {2: [max(step.peaks(*masks(seed)))]}, *masks(seed))
    for plan in (masks(seed), masks(other)):
        excess = model.memory(*plan) - max(step.peaks(*plan))
        gradients = sum(int(trainable_LE.sum()) for _, trainable_LE in (masks(seed), plan)) * DEMO.gradient_bytes
        slots = int(masks(seed)[0].sum()) * DEMO.slot_bytes
        assert 0 <= excess <= gradients * (1 + copies) + slots


def test_calibration_keeps_measured_terms_and_refuses_an_impossible_peak() -> None:
    plan = masks(4)
    model = calibrated(DEMO, {1: [10**6], 2: [2 * 10**6]}, *plan, flops_per_token=123.0)
    assert model.trunk.flops_per_token == 123.0
    assert model.trunk.buffer_bytes == DEMO.trunk.buffer_bytes
    with pytest.raises(ValueError, match="measure a step that has both"):
        calibrated(DEMO, {2: [1000]}, *plan)


def test_transients_of_an_unmeasured_k_come_from_the_next_larger_one() -> None:
    trunk = TrunkCost({2: (10,), 8: (30,)})
    assert [trunk.stages(k) for k in (1, 2, 3, 8)] == [(10,), (10,), (30,), (30,)]
    with pytest.raises(ValueError, match="top_k=9"):
        trunk.stages(9)


@given(SEEDS, st.integers(1, 2))
def test_inv1_real_flops_never_pass_the_bound(seed: int, top_k: int) -> None:
    permitted_LE, trainable_LE = masks(seed)
    rng = np.random.default_rng(seed)
    rows_LE = np.zeros(permitted_LE.shape, dtype=int)
    for layer in range(DEMO.num_layers):
        held = np.flatnonzero(permitted_LE[layer])
        for _ in range(DEMO.tokens):
            rows_LE[layer, rng.permutation(held)[:top_k]] += 1
    bound = DEMO.step_flops(permitted_LE, trainable_LE, top_k=top_k)
    assert DEMO.real_flops(rows_LE, trainable_LE, tokens=DEMO.tokens) <= bound


@given(SEEDS, st.integers(1, 2))
def test_the_flop_bound_is_reached(seed: int, top_k: int) -> None:
    permitted_LE, trainable_LE = masks(seed)
    rows_LE = np.zeros(permitted_LE.shape, dtype=int)
    for layer in range(DEMO.num_layers):  # every token prefers trainable experts
        order = np.argsort(~trainable_LE[layer] * 1 + ~permitted_LE[layer] * 2, kind="stable")
        rows_LE[layer, order[: min(top_k, permitted_LE[layer].sum())]] = DEMO.tokens
    assert DEMO.real_flops(rows_LE, trainable_LE, tokens=DEMO.tokens) == DEMO.step_flops(
        permitted_LE, trainable_LE, top_k=top_k
    )


def spec_of(**tensors: tuple[Kind, tuple[int, ...]]) -> ModelSpec:
    """The facts of a model of DEMO's sizes with a trunk of 408 parameters and a layer of these tensors."""
    dense: dict[str, tuple[Kind, tuple[int, ...]]] = {"dense.embed": ("dense", (50, 8)), "dense.norm": ("dense", (8,))}
    params = [ParamSpec(key, kind, shape, torch.float32) for key, (kind, shape) in dense.items()]
    params += [
        ParamSpec(f"moe.{layer}.{name}", kind, shape, torch.float32, layer)
        for layer in range(3)
        for name, (kind, shape) in tensors.items()
    ]
    sizes = {"num_layers": 3, "num_experts": 5, "top_k": 2, "hidden_size": 8, "intermediate_size": 6}
    return ModelSpec("made up", "causal_lm", **sizes, activation="swiglu", params=tuple(params))


PLAIN: dict[str, tuple[Kind, tuple[int, ...]]] = {
    "router": ("router", (5, 8)),
    "w_in": ("expert", (5, 12, 8)),
    "w_out": ("expert", (5, 8, 6)),
}


def test_model_is_read_off_an_adapters_spec() -> None:
    model = cost_model_of(spec_of(**PLAIN), tokens=7, train_dense=True)
    assert model == replace(DEMO, trunk_params=408, trunk_trainable=408, trunk=TrunkCost())
    assert cost_model_of(spec_of(**PLAIN), tokens=7).trunk_trainable == 0


def test_biases_are_bytes_of_their_experts_and_routers_and_no_products() -> None:
    plain = cost_model_of(spec_of(**PLAIN), tokens=7)
    biased = cost_model_of(
        spec_of(
            **PLAIN,
            bias_in=("expert", (5, 12)),
            bias_out=("expert", (5, 8)),
            router_bias=("router", (5,)),
            correction_bias=("frozen", (5,)),
        ),
        tokens=7,
    )
    assert (biased.trunk_params, biased.trunk_trainable) == (408 + 3 * 5, 0)
    assert biased.expert_params - plain.expert_params == 12 + 8
    assert biased.expert_weights == plain.expert_weights
    permitted_LE, trainable_LE = np.zeros((2, 3, 5), dtype=bool)
    permitted_LE[:, :3], trainable_LE[:, :2] = True, True
    held, learning, routers, corrections = 9 * 20 * 4, 6 * (20 + 1) * 4, 15 * 4, 15 * 4
    down = biased.bytes_down(permitted_LE) - plain.bytes_down(permitted_LE)
    assert down == held + routers + corrections
    again = [model.bytes_down(permitted_LE, first_participation=False) for model in (biased, plain)]
    assert again[0] - again[1] == held + routers
    assert biased.bytes_up(trainable_LE) - plain.bytes_up(trainable_LE) == learning
    memory = [model.memory(permitted_LE, trainable_LE) for model in (biased, plain)]
    assert memory[0] - memory[1] == held + routers + corrections + 3 * learning  # gradients and two moments
    for of in (biased, plain):
        assert of.step_flops(permitted_LE, trainable_LE) == plain.step_flops(permitted_LE, trainable_LE)
        assert of.forward_flops(permitted_LE, tokens=9) == plain.forward_flops(permitted_LE, tokens=9)
    frozen = replace(biased, train_router=False)
    assert biased.bytes_up(trainable_LE) - frozen.bytes_up(trainable_LE) == 6 * (8 + 1) * 4
    few = coded(replace(biased, hidden_size=32, intermediate_size=64), "int8")
    assert (
        few.frozen_bytes - few.slot_bytes
        == FORMATS["int8"].bytes_of(128, 32) + FORMATS["int8"].bytes_of(32, 64) + (128 + 32) * 4
    )


def test_bad_models_are_refused() -> None:
    with pytest.raises(ValueError, match="top_k=6"):
        replace(DEMO, top_k=6)
    with pytest.raises(ValueError, match="3 stages; give 1 or 4"):
        replace(DEMO, trunk=TrunkCost({2: (1, 2, 3)}))
