"""Ranks add up only what some client changed, in buckets, and get the bits of the whole (invariant 13)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import process_group
from safetensors.torch import load_file, save_file
from torch import Tensor
from update_cases import (
    ALL,
    SHAPE_LE,
    Client,
    accumulate,
    make_clients,
    make_plan,
    make_specs,
    make_update,
)

from fedmoe_core.model.spec import ParamSpec
from fedmoe_core.server import accumulator, buckets
from fedmoe_core.server.accumulator import Accumulator
from fedmoe_core.server.buckets import bucket_plan, touched_spans
from fedmoe_core.server.fixed_point import SumSettings

HEADER = 4 + 4 * ALL.size  # values


def one_expert(client: int) -> Client:
    """A client that trains expert 1 of layer 0 only, and no dense tensor."""
    mask = np.zeros(SHAPE_LE, dtype=bool)
    mask[0, 1] = True
    plan = make_plan(mask, client=client)
    return make_update(plan), plan


def without_weight(client: int) -> Client:
    """A client that trains all, but whose experts and routers count nothing."""
    plan = make_plan(ALL, client=client)
    table = np.zeros(SHAPE_LE)
    return replace(make_update(plan), expert_weight_LE=table, router_weight_LE=table, gate_weight=0.0), plan


# Name: the clients of a round, whether the trunk trains. Ranks take them in turn, so some have none.
ROUNDS: dict[str, tuple[Callable[[], list[Client]], bool]] = {
    "seven clients": (lambda: make_clients(7), True),
    "one client, one expert": (lambda: [one_expert(0)], False),
    "one expert of two clients": (lambda: [one_expert(0), one_expert(1)], False),
    "trained without weight": (lambda: [without_weight(0), one_expert(1)], False),
    "no client": (list, True),
}


def summed(clients: list[Client], *, dense: bool, format_: SumSettings | None = None) -> Accumulator:
    if dense:
        return accumulate(clients, format_)
    sums = Accumulator(make_specs(), format_)
    for update, plan in clients:
        assert sums.add(update, plan).accepted
    return sums


def _on_rank(rank: int, ranks: int, folder: str, bucket: int) -> None:
    torch.set_num_threads(1)
    accumulator.BUCKET = bucket
    sent: list[int] = []
    whole = dist.all_reduce

    def counted(tensor: Tensor, *args: object, **options: object) -> None:
        assert tensor.dtype == torch.int64
        sent.append(tensor.numel())
        whole(tensor, *args, **options)

    dist.all_reduce = counted
    found = {}
    with process_group(rank, Path(folder), ranks):
        for name, (clients, dense) in ROUNDS.items():
            sums = summed(clients()[rank::ranks], dense=dense)
            record = sums.sums()
            kept = {key: value.clone() for key, value in record.numerators.items()}
            sums.all_reduce()
            assert all(torch.equal(record.numerators[key], kept[key]) for key in kept), "a lent record changed"
            found |= {f"{name}, sums": sums.flatten(), f"{name}, sent": torch.tensor(sent)}
            sent.clear()
    save_file(found, f"{folder}/{rank}.safetensors")


@pytest.mark.parametrize("bucket", [10, buckets.BUCKET])
@pytest.mark.parametrize("ranks", [2, 4])
def test_inv13_the_touched_rows_alone_give_the_bits_of_the_whole(ranks: int, bucket: int, tmp_path: Path) -> None:
    """Small buckets cut rows and pack several; each rank sends the same number of values each time."""
    mp.start_processes(_on_rank, args=(ranks, str(tmp_path), bucket), nprocs=ranks, start_method="fork", join=True)
    files = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(ranks)]
    for name, (clients, dense) in ROUNDS.items():
        straight = summed(clients(), dense=dense)
        touched = sum(stop - start for start, stop in spans_of(straight))
        for found in files:
            assert torch.equal(found[f"{name}, sums"], straight.flatten()), name
            sent = found[f"{name}, sent"].tolist()
            assert sent[0] == HEADER
            assert sum(sent[1:]) == touched, name
            assert len(sent) == 1 + -(-touched // bucket), name
            assert max(sent[1:], default=0) <= bucket
    one = sum(files[0]["one client, one expert, sent"].tolist())
    assert one == HEADER + 8 * 3 + 3 * 4 + 3, "one row of w_in, w_out and the router, of 10"
    assert files[0]["no client, sent"].tolist() == [HEADER]


def spans_of(sums: Accumulator) -> list[buckets.Span]:
    found = sums.sums()
    return touched_spans(
        sums.specs,
        HEADER,
        expert_den_LE=found.expert_den_LE.tolist(),
        router_den_LE=found.router_den_LE.tolist(),
        dense_den=found.dense_den,
    )


@settings(max_examples=100, deadline=None)
@given(count=st.integers(0, 3), seed=st.integers(0, 2**16))
def test_inv13_outside_the_touched_spans_all_sums_are_zero(count: int, seed: int) -> None:
    sums = accumulate(make_clients(count, seed))
    flat, spans = sums.flatten(), spans_of(sums)
    for start, stop in spans:
        flat[start:stop] = 0
    assert not flat[HEADER:].any()
    assert all(start < stop for start, stop in spans)
    assert all(before[1] < after[0] for before, after in pairwise(spans))


def test_inv13_spans_follow_the_denominators() -> None:
    specs = [
        ParamSpec("moe.0.router", "router", (3, 2), torch.float32, 0),
        ParamSpec("moe.0.w_in", "expert", (3, 4), torch.float32, 0),
        ParamSpec("dense.scale", "dense", (), torch.float32),
        ParamSpec("dense.none", "dense", (0, 5), torch.float32),
        ParamSpec("dense.head", "dense", (5,), torch.float32),
    ]
    den = {"expert_den_LE": [[7, 0, 1]], "router_den_LE": [[0, 0, 1]]}
    assert touched_spans(specs, 100, **den, dense_den=0) == [(104, 110), (114, 118)]
    assert touched_spans(specs, 100, **den, dense_den=1) == [(104, 110), (114, 124)]
    none = {"expert_den_LE": [[0, 0, 0]], "router_den_LE": [[0, 0, 0]]}
    assert touched_spans(specs, 100, **none, dense_den=0) == []


def test_inv13_buckets_are_full_but_the_last() -> None:
    spans = [(0, 3), (10, 25), (30, 31)]
    assert bucket_plan(spans, 8) == (((0, 3), (10, 15)), ((15, 23),), ((23, 25), (30, 31)))
    assert bucket_plan(spans, 100) == (((0, 3), (10, 25), (30, 31)),)
    assert bucket_plan([(5, 21)], 8) == (((5, 13),), ((13, 21),))
    assert bucket_plan([], 8) == ()


def test_inv13_a_quarter_of_the_experts_sends_a_quarter() -> None:
    """Of 64 experts with 200 thousand numbers each 16 are touched, apart: 26 MB of 102, in buckets of 16 MB."""
    spec = ParamSpec("moe.0.w_in", "expert", (64, 200_000), torch.float32, 0)
    den_E = [int(expert % 4 == 0) for expert in range(64)]
    spans = touched_spans([spec], 0, expert_den_LE=[den_E], router_den_LE=[den_E], dense_den=0)
    plan = bucket_plan(spans, buckets.BUCKET)
    sizes = [sum(stop - start for start, stop in bucket) for bucket in plan]
    assert sum(sizes) == 3_200_000
    assert len(sizes) == 2
    assert max(sizes) * 8 <= 16 * 2**20


def _too_many(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    with process_group(rank, Path(folder)):
        sums = accumulate(make_clients(4)[rank::2], SumSettings(max_clients=3))
        before = sums.flatten()
        with pytest.raises(ValueError, match="4 clients are past max_clients = 3"):
            sums.all_reduce()
        assert torch.equal(sums.flatten(), before)


def test_inv13_too_many_clients_are_refused_on_every_rank_and_leave_the_sums(tmp_path: Path) -> None:
    mp.start_processes(_too_many, args=(str(tmp_path),), nprocs=2, start_method="fork", join=True)
