"""Blocks, strides, runs of rows and the shifted rounding change no bit of a sum and no verdict on an update."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sums_restated import add_whole
from torch import Tensor
from update_cases import ALL, make_plan, make_specs, make_update

from fedmoe_core.budget.peak_memory import trace_memory
from fedmoe_core.model.spec import ParamSpec
from fedmoe_core.server import adding, blocks
from fedmoe_core.server.accumulator import Accumulator
from fedmoe_core.server.adding import Adder
from fedmoe_core.server.blocks import cut, reach, square_sum
from fedmoe_core.server.fixed_point import SumSettings

CPU = torch.device("cpu")
NARROW = SumSettings()  # a term is at most 2^48: rounded by the shift
AT_THE_EDGE = SumSettings(scale_bits=36, weight_bits=15, max_clients=2048)  # at most 2^51: the last that is shifted
WIDE = SumSettings(scale_bits=36, weight_bits=16, max_clients=1024)  # 2^52: the first that round() rounds
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def strided(plain: Tensor, way: str) -> Tensor:
    """The same numbers in other places of memory."""
    if way == "transposed":
        return plain.mT.contiguous().mT if plain.dim() > 1 else plain
    if way == "every other":
        return plain.repeat_interleave(2, dim=-1)[..., ::2]
    return plain


def drawn(shape: tuple[int, ...], dtype: torch.dtype, seed: int, *, scale_bits: int) -> Tensor:
    """Numbers of all sizes up to the bound: a third of them ties of the rounding, a few the bound itself and zeros."""
    rng = np.random.default_rng(seed)
    wild = rng.uniform(-1, 1, shape) * 2.0 ** rng.integers(-scale_bits - 3, 1, shape)
    ties = (rng.integers(-200, 200, shape) + 0.5) * 2.0**-scale_bits
    ends = rng.choice([-1.0, -0.0, 1.0], shape)
    return torch.from_numpy(np.asarray(np.choose(rng.choice([0, 0, 0, 1, 1, 2], shape), [wild, ties, ends]))).to(dtype)


@settings(max_examples=300, deadline=None)
@given(
    data=st.data(),
    format_=st.sampled_from([NARROW, AT_THE_EDGE, WIDE]),
    dtype=st.sampled_from(DTYPES),
    tail=st.sampled_from([(), (1,), (7,), (5, 3), (0,), (4, 0, 2), (2, 3, 4)]),
    way=st.sampled_from(["plain", "transposed", "every other"]),
    block=st.sampled_from([1, 2, 7, 16, 40, 1 << 18]),
    share=st.sampled_from([1.0, 0.5, 2**-0.5, 1 / 3, 1e-9]),
    long_row=st.sampled_from([1, 8, 1 << 13]),
    seed=st.integers(0, 2**16),
)
def test_inv13_every_way_to_add_gives_the_bits_of_the_formula(
    data: st.DataObject,
    format_: SumSettings,
    dtype: torch.dtype,
    tail: tuple[int, ...],
    way: str,
    block: int,
    share: float,
    long_row: int,
    seed: int,
) -> None:
    height = data.draw(st.integers(1, 9))
    rows = data.draw(st.lists(st.integers(0, height - 1), unique=True, max_size=height))
    if data.draw(st.booleans()):
        rows.sort()
    weight = st.sampled_from([0, 0, 1, 2, 3, format_.top_weight // 2, format_.top_weight])
    weights = data.draw(st.lists(weight, min_size=len(rows), max_size=len(rows)))
    plain = drawn((len(rows), *tail), dtype, seed, scale_bits=format_.scale_bits)
    delta = strided(plain, way) if tail else plain
    total = torch.from_numpy(np.random.default_rng(seed).integers(-(2**60), 2**60, (height, *tail)))
    want = total.clone()
    add_whole(want, plain, weights, rows, format_.scale_bits, share=share)

    kept = delta.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adding, "BLOCK_CPU", block)
        patch.setattr(adding, "LONG_ROW", long_row)
        Adder.on(CPU, format_, delta.numel(), share=share).add(total, delta, weights, rows)
    assert torch.equal(total, want)
    assert torch.equal(delta, kept)


@pytest.mark.parametrize("format_", [NARROW, AT_THE_EDGE, WIDE])
def test_inv13_blocks_of_the_real_size_give_the_bits_of_the_formula(format_: SumSettings) -> None:
    """Rows longer than a block, beside each other and apart, some of weight 0; a million values."""
    delta = drawn((4, 270_001), torch.float32, 3, scale_bits=36)
    total = torch.zeros(6, 270_001, dtype=torch.int64)
    want = total.clone()
    weights, rows = [format_.top_weight, 0, 17, 1], [1, 2, 3, 0]
    add_whole(want, delta, weights, rows, format_.scale_bits)
    Adder.on(CPU, format_, delta.numel()).add(total, delta, weights, rows)
    assert torch.equal(total, want)
    assert want.count_nonzero() > 500_000


def test_inv13_the_formats_of_these_tests_lie_on_both_sides_of_the_shift() -> None:
    assert NARROW.largest_term < adding.SHIFTABLE == AT_THE_EDGE.largest_term < WIDE.largest_term
    assert torch.tensor(adding.SHIFT, dtype=torch.float64).view(torch.int64) == adding.SHIFT_BITS


@settings(max_examples=200, deadline=None)
@given(term=st.integers(-(2**52), 2**52).map(lambda halves: halves / 2), offset=st.sampled_from([0.0, 2e-16, -2e-16]))
def test_inv13_the_shift_rounds_half_to_even_up_to_its_edge(term: float, offset: float) -> None:
    """Python's own round is the judge; terms are halves, and their neighbours."""
    value = min(max(term * (1 + offset), -(2.0**51)), 2.0**51)
    shifted = torch.tensor([value], dtype=torch.float64).add_(adding.SHIFT).view(torch.int64).sub_(adding.SHIFT_BITS)
    assert int(shifted) == round(value)


def test_inv13_a_row_of_weight_0_is_not_read() -> None:
    """NaN in it would show: a long row without a weight costs nothing."""
    delta = torch.ones(3, adding.LONG_ROW)
    delta[1] = math.nan
    total = torch.zeros(3, adding.LONG_ROW, dtype=torch.int64)
    Adder.on(CPU, NARROW, delta.numel()).add(total, delta, [1, 0, 1], [0, 1, 2])
    assert total[:, 0].tolist() == [2**36, 0, 2**36]


def test_inv13_a_dense_scalar_and_an_empty_tensor_are_summed() -> None:
    specs = [*make_specs(), ParamSpec("dense.none", "dense", (0, 3), torch.float32)]
    plan = make_plan(ALL)
    update = make_update(plan, train_dense=True)
    deltas = {**update.deltas, "dense.scale": torch.tensor(-0.25), "dense.none": torch.zeros(0, 3)}
    sums = Accumulator(specs, train_dense=True)
    assert sums.add(replace(update, deltas=deltas, sample_weight=1.0), plan).accepted
    assert int(sums.sums().numerators["dense.scale"]) == -4095 * 2**34
    assert sums.sums().numerators["dense.none"].shape == (0, 3)


@settings(max_examples=200, deadline=None)
@given(
    shape=st.sampled_from([(), (1,), (9,), (5, 3), (2, 3, 4), (3, 0)]),
    way=st.sampled_from(["plain", "transposed", "every other"]),
    block=st.integers(1, 30),
)
def test_parts_are_views_that_make_up_the_tensor(shape: tuple[int, ...], way: str, block: int) -> None:
    values = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
    values = strided(values, way) if shape else values
    parts = list(cut(block, values, values.clone(memory_format=torch.contiguous_format)))
    flat = [number for part, _ in parts for number in part.reshape(-1).tolist()]
    assert flat == values.reshape(-1).tolist()
    assert flat == [number for _, part in parts for number in part.reshape(-1).tolist()]
    assert all(part.numel() <= block for part, _ in parts)
    assert {part.untyped_storage().data_ptr() for part, _ in parts} == {values.untyped_storage().data_ptr()}


@settings(max_examples=200, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    size=st.sampled_from([1e-44, 1e-30, 1e-19, 1e-4, 1.0, 6e4]),
    shape=st.sampled_from([(1,), (999,), (7, 40), (3, 5, 9)]),
    way=st.sampled_from(["plain", "transposed", "every other"]),
    block=st.sampled_from([1, 50, 1 << 17]),
    seed=st.integers(0, 2**16),
)
def test_the_squares_never_pass_what_one_visit_says(
    dtype: torch.dtype, size: float, shape: tuple[int, ...], way: str, block: int, seed: int
) -> None:
    values = torch.from_numpy(np.random.default_rng(seed).uniform(-size, size, shape)).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_CPU", block)
        largest, squares = reach(strided(values, way))
        square = square_sum(strided(values, way))
    wide = values.double()
    assert largest == float(wide.abs().max())
    assert square == pytest.approx(float(wide.square().sum()), rel=1e-12, abs=0)
    assert square <= squares <= square * 1.04 + values.numel() * 2e-38


@pytest.mark.parametrize("place", [0, 49, 50, 120])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_inv11_poison_shows_wherever_it_lies(
    place: int, poison: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_CPU", 50)
    values = torch.ones(121, dtype=dtype)
    values[place] = poison
    assert not math.isfinite(reach(values)[0])


@pytest.mark.parametrize("bound", [1e-40, 1e-25, 1.0, 99.0, 1e300])
def test_inv11_the_norm_is_judged_in_float64_where_one_visit_cannot_tell(bound: float) -> None:
    """The float32 squares of 1e-25 are 0, and 1e300 squared is infinite: neither lets anything in or out."""
    plan = make_plan(ALL)
    update = make_update(plan)
    outcome = Accumulator(make_specs(), SumSettings(norm_bound=bound)).add(update, plan)
    norm = math.sqrt(sum(float(delta.double().square().sum()) for delta in update.deltas.values()))
    assert outcome.accepted == (norm <= bound)
    small = replace(update, deltas={key: torch.full_like(delta, 2e-26) for key, delta in update.deltas.items()})
    norm = 2e-26 * math.sqrt(sum(delta.numel() for delta in small.deltas.values()))
    outcome = Accumulator(make_specs(), SumSettings(norm_bound=bound)).add(small, plan)
    assert outcome.accepted == (norm <= bound)


@pytest.mark.parametrize("way", ["plain", "transposed", "every other"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_checking_and_adding_take_a_small_buffer(way: str, dtype: torch.dtype) -> None:
    """Of 2 million values: one buffer of float64, and casts of one block of the checks."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        specs = [
            ParamSpec("moe.0.w_in", "expert", (2, 500, 1000), dtype, 0),
            ParamSpec("dense.head", "dense", (1000, 1000), dtype),
        ]
        plan = make_plan(np.ones((1, 2), dtype=bool))
        table = np.ones((1, 2))
        deltas = {spec.key: strided(torch.full(spec.shape, 1e-3, dtype=dtype), way) for spec in specs}
        update = replace(
            make_update(make_plan(ALL)),
            plan_id=plan.id,
            deltas=deltas,
            expert_weight_LE=table,
            router_weight_LE=table,
            profile=None,
        )
        sums = Accumulator(specs, train_dense=True)
        outcome, trace = trace_memory(lambda: sums.add(update, plan), CPU)
    finally:
        torch.set_num_threads(threads)
    assert outcome.accepted, outcome.reason
    assert 8 * adding.BLOCK_CPU <= trace.peak <= 8 * adding.BLOCK_CPU + 100_000


def test_what_is_known_of_the_deltas_decides_the_rounding_and_changes_no_bit() -> None:
    """With weights of 16 bits a delta of 1 is past what can be shifted, and one of 0.4 is not."""
    format_ = SumSettings(scale_bits=36, weight_bits=16)
    delta = torch.linspace(-0.4, 0.4, 4097).unsqueeze(0)
    known, unknown = (Adder.on(CPU, format_, delta.numel(), largest=largest) for largest in (0.4, None))
    assert (known.shifts, unknown.shifts) == (True, False)
    totals = [torch.zeros(1, delta.numel(), dtype=torch.int64) for _ in range(2)]
    for adder, total in zip((known, unknown), totals, strict=True):
        adder.add(total, delta, [format_.top_weight], [0])
    exact = [round(float(value) * format_.top_weight * 2.0**36) for value in delta[0]]
    assert totals[0].tolist() == totals[1].tolist() == [exact]
