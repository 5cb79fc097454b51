"""Offsets beyond 2^31 elements, executed: tensors of over 4 GB of which only the last pages are ever touched."""

from __future__ import annotations

import os

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in a process with TRITON_INTERPRET=1", allow_module_level=True)

from forward_cases import POINTERS, assert_near, normal, run

from fedmoe_kernels.gpu.experts.combine import combine
from fedmoe_kernels.gpu.experts.decode import Codes
from fedmoe_kernels.gpu.experts.down import down, input_gradient, rank_product
from fedmoe_kernels.gpu.experts.schedule import Schedule
from fedmoe_kernels.gpu.experts.storage import Direct, RankTerm, Stored
from fedmoe_kernels.gpu.experts.up import up
from fedmoe_kernels.gpu.routing.choose import tokens_of_block

H, I, ROWS = 64, 32, 5  # noqa: E741
ONE = torch.ones(1)


@pytest.fixture(autouse=True)
def _untouched(poisoned: None) -> None:
    """Poison would touch every page of the 4 GB; the fixture `poisoned` undoes this when the test ends."""
    torch.use_deterministic_algorithms(False)


def far(*shape: int, last: Tensor | None = None) -> Tensor:
    """A float16 tensor of more than 2^31 elements and `shape` behind its first axis; `last` is written at its end."""
    size = 2**31 // int(torch.tensor(shape).prod()) + 100
    tensor = torch.empty(size, *shape, dtype=torch.float16)
    if last is not None:
        tensor[-last.shape[0] :] = last
    return tensor


def one_tile(slot: int, first: int) -> Schedule:
    """Five rows from `first` on, of one slot."""
    table_M4 = torch.tensor([[slot, first, first + ROWS, 0]], dtype=torch.int32)
    return Schedule(table_M4, torch.zeros(1, dtype=torch.int32), POINTERS.m)


def half(*shape: int, seed: int) -> Tensor:
    return (normal(*shape, seed=seed) / shape[-1] ** 0.5).half()


def product(rows_NK: Tensor, w_NK: Tensor) -> Tensor:
    return rows_NK.double() @ w_NK.double().t()


@pytest.mark.parametrize("where", ["tokens", "rows", "slots", "frozen slots"])
def test_up(where: str) -> None:
    x, w = half(ROWS, H, seed=1), half(1, I, H, seed=2)
    tokens_R, first, slot = torch.arange(ROWS), 0, 0
    z, x_TH, w_in = torch.empty(ROWS, I, dtype=torch.float16), x, Stored(w)
    if where == "tokens":
        x_TH = far(H, last=x)
        tokens_R = tokens_R + len(x_TH) - ROWS
    if where == "rows":
        z = far(I)
        first = len(z) - ROWS
        tokens_R = torch.empty(len(z), dtype=torch.int64)
        tokens_R[first:] = torch.arange(ROWS)
    if where == "slots":
        w_in = Stored(far(I, H, last=w))
        slot = len(w_in.trainable) - 1
    if where == "frozen slots":
        w_in = Stored(w, far(I, H, last=w))
        slot = len(w_in.frozen)
    how = {"activation": "relu", "schedule": one_tile(slot, first), "tile": POINTERS}
    run(up(x_TH, tokens_R, w_in, None, z_RF=z, h_RI=None, **how))
    assert_near(z[first:], product(x, w[0]), "z", tolerance=1e-3)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("where", ["left rows", "rows", "slots", "targets", "factors", "rank-sized rows"])
def test_rows(where: str, transposed: bool) -> None:
    left, w = half(ROWS, I, seed=1), half(1, H, I, seed=2)
    want = product(left, w[0])
    stack, first, slot, direct, term = w.transpose(1, 2).contiguous() if transposed else w, 0, 0, None, None
    h_RI, out = left, torch.empty(ROWS, H, dtype=torch.float16)
    if where == "left rows":
        h_RI = far(I, last=left)
        first = len(h_RI) - ROWS
        targets = torch.empty(len(h_RI), dtype=torch.int64)
        targets[first:] = torch.arange(ROWS)
        direct = Direct(targets, targets, None, torch.arange(ROWS)[:, None])
    if where in ("rows", "targets"):
        out = far(H)
    if where == "rows":
        first = len(out) - ROWS
        h_RI = torch.empty(len(out), I, dtype=torch.float16)
        h_RI[first:] = left
    if where == "targets":
        targets = torch.arange(ROWS) + len(out) - ROWS
        direct = Direct(targets, targets, None, torch.zeros(16, 1, dtype=torch.int64))
    if where == "slots":
        stack = far(*stack.shape[1:], last=stack)
        slot = len(stack) - 1
    if where == "factors":
        factor = half(1, H, 16, seed=3)
        laid = factor.transpose(1, 2) if transposed else factor
        term = RankTerm(half(ROWS, 16, seed=4), far(*laid.shape[1:], last=laid), torch.empty(0))
        slot = len(term.factor) - 1
        scale_B = torch.empty(len(term.factor))
        scale_B[-1] = 2.0
        term = term._replace(scale_B=scale_B)
        want += 2 * product(term.rows_Rr, factor[0])
    if where == "rank-sized rows":
        factor, rank_rows = half(1, H, 64, seed=3), half(ROWS, 64, seed=4)
        term = RankTerm(far(64, last=rank_rows), factor.transpose(1, 2).contiguous() if transposed else factor, ONE)
        first = len(term.rows_Rr) - ROWS
        h_RI, targets = torch.empty(first + ROWS, I, dtype=torch.float16), torch.empty(first + ROWS, dtype=torch.int64)
        h_RI[first:], targets[first:] = left, torch.arange(ROWS)
        direct = Direct(targets, targets, None, torch.arange(ROWS)[:, None])
        want += product(rank_rows, factor[0])
    w_all = Stored(stack, base_of_slot_B=_all_first(slot) if where == "factors" else None)
    how = {"schedule": one_tile(slot, first), "tile": POINTERS, "direct": direct, "term": term}
    run(input_gradient(h_RI, w_all, out, **how) if transposed else down(h_RI, w_all, None, out, **how))
    assert_near(out[-ROWS:], want, "rows", tolerance=1e-3)


def _all_first(slot: int) -> Tensor:
    """A base for each slot, of which only the last is looked up."""
    base_of_slot_B = torch.empty(slot + 1, dtype=torch.int64)
    base_of_slot_B[-1] = 0
    return base_of_slot_B


def test_rank_product() -> None:
    rows, factor = half(ROWS, H, seed=1), half(1, 16, H, seed=2)
    x_TH, out = far(H, last=rows), torch.empty(ROWS, 16, dtype=torch.float16)
    tokens_R = torch.arange(ROWS) + len(x_TH) - ROWS
    how = {"schedule": one_tile(0, 0), "tile": POINTERS}
    run(rank_product(x_TH, factor, out, transposed=False, tokens_R=tokens_R, **how))
    assert_near(out, product(rows, factor[0]), "rows", tolerance=1e-3)


def test_codes() -> None:
    """More than 2^31 codes of one byte."""
    left = half(ROWS, 96, seed=1)
    slots = 2**31 // (H * 96) + 2
    codes = torch.empty(slots, H, 96, dtype=torch.int8)
    scale = torch.empty(slots, H, 3)
    codes[-1] = torch.randint(-127, 128, (H, 96), generator=torch.Generator().manual_seed(1))
    scale[-1] = torch.rand(H, 3, generator=torch.Generator().manual_seed(2)) / 1000
    out = torch.empty(ROWS, H, dtype=torch.float16)
    w = Stored(torch.empty(0, H, 96, dtype=torch.float16), codes, Codes("int8", scale, None))
    run(down(left, w, None, out, schedule=one_tile(slots - 1, 0), tile=POINTERS))
    decoded = (codes[-1].double() * scale[-1].double().repeat_interleave(32, 1)).half()
    assert_near(out, product(left, decoded), "rows", tolerance=1e-3)


def test_combine() -> None:
    rows = half(ROWS, H, seed=1)
    rows_RH, out = far(H, last=rows), torch.empty(2, H, dtype=torch.float16)
    rows_TK = (torch.arange(4) + len(rows_RH) - ROWS).view(2, 2)
    run(combine(rows_RH, rows_TK, None, out))
    assert_near(out, rows[:4].double().view(2, 2, H).sum(1), "y", tolerance=1e-3)


@triton.jit
def _first_logit_kernel(out, block, tokens, E: tl.constexpr, BT: tl.constexpr):
    t, inside, _live, _owner = tokens_of_block(out, out, block, tokens, 1, BT, False, False)
    tl.store(out + tl.arange(0, BT), tl.where(inside, t * E, -1))


def test_logits_of_the_last_block_of_tokens() -> None:
    """All routing kernels find their tokens so: 2^24 - 3 tokens of 4096 experts are 2^36 logits."""
    tokens, BT, E = 2**24 - 3, 16, 4096
    out = torch.empty(BT, dtype=torch.int64)
    _first_logit_kernel[(1,)](out, 2**20 - 1, tokens, E=E, BT=BT)
    t = torch.arange(2**24 - 16, 2**24)
    assert torch.equal(out, torch.where(t < tokens, t * E, -1))
