"""The row order by the kernels: choices made elsewhere, many slots, many blocks, and launches that never wait."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from route_cases import INDEX_FIELDS, cohort, draw, mask
from torch import Tensor

from fedmoe_kernels import Routing, SlotMap
from fedmoe_kernels.gpu.routing import driver as routing
from fedmoe_kernels.gpu.routing import place
from fedmoe_kernels.routing.ops import place_rows_op


def both(experts_TK: Tensor, table_CE: Tensor, client_T: Tensor | None = None, valid_T: Tensor | None = None) -> None:
    """The kernels against the torch body, field by field."""
    slots = int((table_CE >= 0).sum())
    args = (experts_TK, table_CE, client_T, valid_T, slots)
    got = place_rows_op(*args, "triton")
    for name, value, expected in zip(INDEX_FIELDS, got, place_rows_op(*args, "torch"), strict=True):
        assert value.dtype == torch.int64, name
        assert torch.equal(value, expected), name


def choices(T: int, K: int, low: int, high: int, *, seed: int = 0, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.randint(low, high, (T, K), generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("few_counts", [True, False])
@pytest.mark.parametrize(
    ("T", "K", "dtype"),
    [
        (0, 2, torch.int64),
        (1, 1, torch.int32),
        (45, 3, torch.int64),  # 3 is not a power of two
        (300, 2, torch.int32),  # 3 blocks
        (40, 16, torch.int64),  # 3 blocks of 16 tokens
    ],
)
def test_rows_of_choices_made_elsewhere(T, K, dtype, few_counts, monkeypatch):
    """Ids outside [0, E), absent experts and padding have no row; also with the sums made by launches of their own."""
    if not few_counts:
        monkeypatch.setattr(place, "FEW_COUNTS", -1)
    table_CE = SlotMap.build(mask(1, 0, 1, 1, 0, 1)).slot_of_expert[None]
    experts_TK = choices(T, K, -2, 9, dtype=dtype)
    both(experts_TK, table_CE)
    both(experts_TK, table_CE, None, torch.arange(T) % 5 > 0)
    both(torch.full((T, K), 3, dtype=dtype), table_CE)  # one slot holds all rows
    both(torch.full((T, K), -1, dtype=dtype), table_CE)  # no row at all


def test_rows_of_a_cohort_with_more_counts_than_one_program_sums_up():
    slot_map, client_T = cohort(24, 70, 310)
    assert 3 * slot_map.num_slots > 4 * 512
    both(choices(310, 8, 0, 70), slot_map.slot_of_expert, client_T)


def test_an_order_of_columns_that_is_not_contiguous():
    table_CE = torch.arange(5).expand(1, 5)
    both(choices(3, 12, 0, 5).t(), table_CE)
    both(choices(12, 6, 0, 5)[:, ::2], table_CE)


def test_from_topk_keeps_the_gradient_of_the_weights():
    whole, experts_TK = SlotMap.build(torch.ones(5, dtype=torch.bool)), choices(7, 2, -1, 6)
    weights_TK = draw(7, 2).requires_grad_()
    got = Routing.from_topk(experts_TK, weights_TK, whole, backend="triton")
    got.weights_TK.sum().backward()
    assert torch.equal(weights_TK.grad, ((experts_TK >= 0) & (experts_TK < 5)).float())


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("T", "E", "B", "C", "forward", "stats"),
    [
        (512, 16, 16, 1, 2, 2),  # one device at the edge
        (1024, 128, 16, 1, 2, 2),
        (32768, 128, 128, 1, 4, 2),
        (16384, 64, 2048, 32, 4, 2),
        (100, 16, 4, 1, 2, 1),
        (0, 16, 4, 1, 2, 1),
    ],
)
def test_nothing_waits_for_the_device(T, E, B, C, forward, stats):
    """Meta tensors have no value to read: what is launched follows from the shapes alone, and this is how much."""
    launches: list[Any] = []
    client_T = meta(T, dtype=torch.int64) if C > 1 else None
    who = routing.Holders(meta(C, E, dtype=torch.int64), client_T, None)
    logits_TE, rule = meta(T, E, dtype=torch.bfloat16), routing.Rule(2, "softmax", True)

    def count() -> int:
        number = len(launches)
        launches.clear()
        return number

    def call(*, with_stats: bool) -> tuple[Tensor, ...]:
        how = {"num_slots": B, "with_stats": with_stats, "execute": launches.append}
        return routing.route(logits_TE, who, None, rule, **how)

    outputs = call(with_stats=False)
    assert count() == forward
    assert [tuple(value.shape) for value in outputs[:4]] == [(T, 2)] * 4
    assert [tuple(value.shape) for value in outputs[4:7]] == [(2 * T,), (2 * T,), (B + 1,)]
    assert tuple(call(with_stats=True)[7].shape) == (C, 4, E)
    assert count() == forward + stats
    routing.place(outputs[1], who, num_slots=B, execute=launches.append)
    assert all(launch.bytes > 0 for launch in launches if T)
    assert count() == forward
    weights_TK = meta(T, 2, dtype=torch.float32)
    routing.route_backward(weights_TK, logits_TE, outputs[1], who, rule, execute=launches.append)
    assert count() == 1


@pytest.mark.parametrize("live", [1.0, 0.6, 0.0])
@pytest.mark.parametrize(("T", "K"), [(0, 2), (1, 1), (45, 3), (300, 4)])
def test_the_inverse_of_the_rows_is_made_again(T, K, live):
    """What the backward does not keep; nothing is written past the last row."""
    experts_TK = choices(T, K, 0, 5, seed=1).where(
        torch.rand(T, K, generator=torch.Generator().manual_seed(2)) < live, -1
    )
    whole = SlotMap.build(torch.ones(5, dtype=torch.bool))
    made = Routing.from_topk(experts_TK, draw(T, K), whole, backend="torch")
    tokens_R, places_R = (torch.full((T * K,), -7) for _ in range(2))
    for launch in place.inverse(made.rows_TK, tokens_R=tokens_R, places_R=places_R):
        launch.run()
    N = int(made.offsets_B1[-1])
    assert torch.equal(tokens_R[:N], made.tokens_R[:N])
    assert torch.equal(places_R[:N], made.places_R[:N])
    assert (tokens_R[N:] == -7).all()
    assert (places_R[N:] == -7).all()
