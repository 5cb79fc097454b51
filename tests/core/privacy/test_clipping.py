"""No client, however hostile, adds more to the sums than the bound; a modest one adds what it would have added."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from update_cases import ALL, Client, make_plan, make_specs, make_update, some_experts

from fedmoe_core.config.run_config import Config
from fedmoe_core.privacy.central import Central
from fedmoe_core.privacy.clipping import clip_share, sensitivity, target
from fedmoe_core.server.accumulator import Accumulator
from fedmoe_core.server.fixed_point import SumSettings

SPECS = tuple(make_specs())
HEADER = 4 + 4 * ALL.size  # counts and denominators, which are never told


def part_of(client: Client, sums: SumSettings, clip: float) -> list[int]:
    """What a client adds to the numerators, as Python's whole numbers."""
    update, plan = client
    accumulator = Accumulator(SPECS, sums, train_dense=True)
    outcome = accumulator.add(update, plan, share=clip_share(update, plan, SPECS, sums, clip))
    assert outcome.accepted, outcome.reason
    return [int(value) for value in accumulator.flatten()[HEADER:].tolist()]


def hostile(seed: int, size: float, share: float, *, weighted: bool) -> Client:
    plan = make_plan(some_experts(seed, share), client=seed % 7)
    update = make_update(plan, seed, train_dense=True, size=size)
    if not weighted:  # all that a client can claim
        ones = plan.trainable_LE.astype(float)
        update = replace(update, expert_weight_LE=ones, router_weight_LE=ones, sample_weight=1.0)
    return update, plan


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    size=st.sampled_from([1e-9, 1e-3, 0.3, 1.0]),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    weighted=st.booleans(),
    clip=st.sampled_from([1e-3, 0.1, 1.0, 30.0]),
    bits=st.sampled_from([(24, 1), (36, 16), (14, 3)]),
)
def test_sensitivity_by_brute_force(
    seed: int, size: float, share: float, weighted: bool, clip: float, bits: tuple[int, int]
) -> None:
    """One client more moves the sums by at most the bound, in exact whole numbers and at any weights."""
    sums = SumSettings(scale_bits=bits[0], weight_bits=bits[1], max_clients=8)
    client = hostile(seed, size, share, weighted=weighted)
    most = sensitivity(sums, clip)
    part = part_of(client, sums, clip)
    assert sum(value * value for value in part) <= most * most
    if not weighted and size == 1.0 and clip <= 1.0:  # it asked for more, and got nearly all that there is
        assert sum(value * value for value in part) >= (0.99 * most - math.sqrt(len(part))) ** 2


def test_replacing_a_client_by_a_hostile_one_moves_the_sums_by_at_most_twice_the_bound() -> None:
    config = Config.load(overrides=["privacy.clip=0.5", "privacy.noise=1", "privacy.delta=1e-3"])
    private = Central.of(config)
    assert private is not None
    others = [hostile(seed, 0.2, 0.5, weighted=True) for seed in (1, 2)]
    evil = hostile(3, 1.0, 1.0, weighted=False)
    flipped = replace(evil[0], deltas={key: -delta for key, delta in evil[0].deltas.items()}), evil[1]
    found = []
    for last in (evil, flipped, None):
        accumulator = Accumulator(SPECS, private.settings, train_dense=True)
        for update, plan in [*others, *([last] if last else [])]:
            assert accumulator.add(update, plan, share=private.share(update, plan, SPECS)).accepted
        found.append(np.array(accumulator.flatten()[HEADER:].tolist(), dtype=object))
    most = sensitivity(private.settings, 0.5)
    assert math.isqrt(sum((found[0] - found[2]) ** 2)) <= most
    assert most < math.isqrt(sum((found[0] - found[1]) ** 2)) <= 2 * most
    assert private.sigma == most  # noise 1


def test_a_modest_client_keeps_its_bits() -> None:
    update, plan = hostile(4, 1e-3, 1.0, weighted=True)
    sums = SumSettings()
    assert clip_share(update, plan, SPECS, sums, 1.0) == 1.0
    plain = Accumulator(SPECS, sums, train_dense=True)
    plain.add(update, plan)
    assert part_of((update, plan), sums, 1.0) == plain.flatten()[HEADER:].tolist()


def test_weights_count_as_the_sums_have_them() -> None:
    """An expert without weight adds nothing, so it takes none of the bound; half a weight takes half."""
    plan = make_plan(ALL)
    update = make_update(plan, size=1.0)
    none_LE, halves_LE = np.zeros(ALL.shape), np.full(ALL.shape, 0.5)
    sums, experts = SumSettings(weight_bits=16), [spec for spec in SPECS if spec.kind != "dense"]

    def share(weight_LE: np.ndarray, clip: float) -> float:
        weighed = replace(update, expert_weight_LE=weight_LE, router_weight_LE=none_LE, gate_weight=0.0)
        return clip_share(weighed, plan, experts, sums, clip)

    assert share(none_LE, 0.01) == 1.0
    assert share(halves_LE, 0.01) == pytest.approx(2 * share(ALL.astype(float), 0.01), rel=1e-4)


def test_an_update_that_is_refused_is_not_measured() -> None:
    update, plan = hostile(5, 0.1, 1.0, weighted=True)
    for deltas in ({}, {**update.deltas, "moe.0.w_in": torch.full_like(update.deltas["moe.0.w_in"], math.nan)}):
        bad = replace(update, deltas=deltas)
        assert clip_share(bad, plan, SPECS, SumSettings(), 1.0) == 1.0
        assert not Accumulator(SPECS, train_dense=True).add(bad, plan).accepted


def test_a_clip_that_rounding_alone_would_pass_is_refused() -> None:
    with pytest.raises(ValueError, match=r"privacy.clip=1e-05 is below what rounding \d+ numbers to 2\^-18 adds"):
        target(SPECS, SumSettings(scale_bits=18, weight_bits=1), 1e-5)
