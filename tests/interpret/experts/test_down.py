"""The products of rows with their slot's matrix in Triton's interpreter against float64."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in a process with TRITON_INTERPRET=1", allow_module_level=True)

import program_order
from forward_cases import (
    CROWDED,
    DESCRIPTORS,
    EMPTY_SLOTS,
    POINTERS,
    STORED,
    Rows,
    assert_near,
    coded,
    normal,
    per_row,
    rows,
    run,
    stored,
    unwritten,
)

from fedmoe_kernels.gpu.experts import persistent
from fedmoe_kernels.gpu.experts.down import down, input_gradient, rank_product
from fedmoe_kernels.gpu.experts.storage import Direct, RankTerm
from fedmoe_kernels.tiles.lookup import Tile

IN_TURN = replace(DESCRIPTORS, persistent=True)
TILES = pytest.mark.parametrize("tile", [POINTERS, DESCRIPTORS, IN_TURN], ids=["pointers", "descriptors", "persistent"])
BOTH_WAYS = pytest.mark.parametrize("transposed", [False, True], ids=["down", "input_gradient"])


def problem(counts: Sequence[int], N: int, K: int) -> tuple[Rows, Tensor, Tensor, Tensor]:
    """(rows, their left operand, w (B, N, K), bias); NaN in rows past the last and in what belongs to empty slots."""
    r, w = rows(counts, 7), normal(len(counts), N, K, seed=1) / K**0.5
    left, bias = unwritten(len(r.tokens_R), K), normal(len(counts), N, seed=3)
    left[: r.count] = normal(r.count, K, seed=2)
    empty_B = torch.tensor(counts) == 0
    w[empty_B], bias[empty_B] = torch.nan, torch.nan
    return r, left, w, bias


def solve(
    r: Rows,
    left: Tensor,
    w: Tensor,
    bias: Tensor | None,
    *,
    tile: Tile,
    trainable: int | None = None,
    transposed: bool = False,
    direct: Direct | None = None,
) -> Tensor:
    """The product by row, or by token with `direct`; NaN wherever nothing was written."""
    out = unwritten(len(r.tokens_R) if direct is None else len(direct.rows_TK), w.shape[1])
    if transposed:
        w_in = stored(w.transpose(1, 2), trainable)
        run(input_gradient(left, w_in, out, schedule=r.schedule, tile=tile, direct=direct))
    else:
        b = None if bias is None else stored(bias, trainable)
        run(down(left, stored(w, trainable), b, out, schedule=r.schedule, tile=tile, direct=direct))
    return out


@TILES
@BOTH_WAYS
@pytest.mark.parametrize("trainable", [None, 0, 2, 5])
def test_rows(tile: Tile, transposed: bool, trainable: int | None) -> None:
    """Odd sizes: N = 40 is 2.5 blocks, K = 24 is 1.5 steps."""
    r, left, w, bias = problem(EMPTY_SLOTS, 40, 24)
    bias = None if transposed else bias
    out = solve(r, left, w, bias, tile=tile, trainable=trainable, transposed=transposed)
    assert_near(out[: r.count], per_row(left[: r.count], w, r.slot_N, bias), "rows")
    assert bool(out[r.count :].isnan().all())


@TILES
@BOTH_WAYS
@pytest.mark.parametrize("counts", [CROWDED, (0, 1), (16, 32), (0, 0)])
def test_one_slot_with_all_rows_one_row_full_tiles_and_none(
    tile: Tile, transposed: bool, counts: Sequence[int]
) -> None:
    r, left, w, _ = problem(counts, 32, 16)
    out = solve(r, left, w, None, tile=tile, transposed=transposed)
    assert_near(out[: r.count], per_row(left[: r.count], w, r.slot_N), "rows")
    assert bool(out[r.count :].isnan().all())


@TILES
@BOTH_WAYS
def test_nan_stays_in_its_slot(tile: Tile, transposed: bool) -> None:
    """The rows and the matrix of slot 2 are NaN; its neighbours in memory are not touched by that."""
    r, left, w, _ = problem((5, 3, 19, 2), 40, 24)
    left[: r.count][r.slot_N == 2], w[2] = torch.nan, torch.nan
    out = solve(r, left, w, None, tile=tile, transposed=transposed)[: r.count]
    others = r.slot_N != 2
    assert bool(out[~others].isnan().all())
    assert_near(out[others], per_row(left[: r.count], w, r.slot_N)[others], "rows")


def one_choice(r: Rows, tokens: int, choices: int) -> Direct:
    """Rows of distinct tokens, each at a random place of its token; the other tokens have none."""
    generator = torch.Generator().manual_seed(5)
    token_N = torch.randperm(tokens, generator=generator)[: r.count]
    place_N = token_N * choices + torch.randint(choices, (r.count,), generator=generator)
    rows_TK = torch.full((tokens, choices), -1)
    rows_TK.view(-1)[place_N] = torch.arange(r.count)
    weights_TK = normal(tokens, choices, seed=6).where(rows_TK >= 0, torch.nan)
    tokens_R, places_R = r.tokens_R.clone(), r.tokens_R.clone()
    tokens_R[: r.count], places_R[: r.count] = token_N, place_N
    return Direct(tokens_R, places_R, weights_TK, rows_TK)


@TILES
@BOTH_WAYS
@pytest.mark.parametrize("choices", [1, 3])
def test_direct_writes_tokens_and_clears_those_without_a_row(tile: Tile, transposed: bool, choices: int) -> None:
    r, left, w, bias = problem(EMPTY_SLOTS, 40, 24)
    direct = one_choice(r, 41, choices)
    bias = None if transposed else bias
    if transposed:
        direct = direct._replace(weights_TK=None)
    out = solve(r, left, w, bias, tile=tile, trainable=3, transposed=transposed, direct=direct)
    weight_N = torch.ones(r.count) if transposed else direct.weights_TK.view(-1)[direct.places_R[: r.count]]
    want = torch.zeros(41, 40, dtype=torch.float64)
    token_N = direct.tokens_R[: r.count]
    want[token_N] = weight_N.double()[:, None] * per_row(left[: r.count], w, r.slot_N, bias)
    assert_near(out, want, "tokens")
    without = torch.ones(41, dtype=torch.bool).index_fill_(0, token_N, False)
    assert not out[without].any()


def test_direct_without_any_row_is_all_zero() -> None:
    r, left, w, _ = problem((0, 0), 40, 24)
    out = solve(r, left, w, None, tile=POINTERS, direct=one_choice(r, 4, 1))
    assert torch.equal(out, torch.zeros(4, 40))


@TILES
@pytest.mark.parametrize("transposed", [False, True], ids=["a", "b"])
@pytest.mark.parametrize(("rank", "gathered"), [(4, True), (16, False), (20, True)])
def test_rank_sized_rows(tile: Tile, transposed: bool, rank: int, gathered: bool) -> None:
    """Adapters on the first three of five slots; rows of the others are left alone."""
    r, left, w, _ = problem(EMPTY_SLOTS, rank, 24)
    factor = stored(w[:3].transpose(1, 2) if transposed else w[:3], None).trainable
    source, tokens_R = (normal(7, 24, seed=8), r.tokens_R) if gathered else (left, None)
    out = unwritten(len(r.tokens_R), rank)
    run(rank_product(source, factor, out, transposed=transposed, tokens_R=tokens_R, schedule=r.schedule, tile=tile))
    adapted = r.slot_N < 3
    read = source[r.tokens_R[: r.count]] if gathered else left[: r.count]
    assert_near(out[: r.count][adapted], per_row(read, w, r.slot_N)[adapted], "rows")
    assert bool(out[: r.count][~adapted].isnan().all())
    assert bool(out[r.count :].isnan().all())


@TILES
@BOTH_WAYS
@pytest.mark.parametrize(("rank", "slots"), [(4, 3), (72, 5)])
def test_adapters_on_the_first_slots(tile: Tile, transposed: bool, rank: int, slots: int) -> None:
    """The rows of slots without an adapter are NaN and may not be read; beyond the factors in memory lies NaN."""
    r, left, w, _ = problem(EMPTY_SLOTS, 40, 24)
    factor, scale_B = normal(slots, 40, rank, seed=7), torch.linspace(0.5, 2.0, slots, dtype=torch.float64)
    rows_Rr = unwritten(len(r.tokens_R), rank)
    adapted = r.slot_N < slots
    rows_Rr[: r.count][adapted] = normal(int(adapted.sum()), rank, seed=8)
    term = RankTerm(rows_Rr, stored(factor.transpose(1, 2) if transposed else factor, None).trainable, scale_B)
    out = unwritten(len(r.tokens_R), 40)
    w_in, how = w.transpose(1, 2), {"schedule": r.schedule, "tile": tile, "term": term}
    run(input_gradient(left, stored(w_in, 2), out, **how) if transposed else down(left, stored(w, 2), None, out, **how))
    want, slot = per_row(left[: r.count], w, r.slot_N), r.slot_N[adapted]
    want[adapted] += scale_B[slot, None] * per_row(rows_Rr[: r.count][adapted], factor, slot)
    assert_near(out[: r.count], want, "rows")
    assert bool(out[r.count :].isnan().all())


@BOTH_WAYS
@pytest.mark.parametrize(("form", "block", "n", "trainable"), STORED)
@pytest.mark.parametrize("at_once", [0, 2])
def test_frozen_slots_as_codes_by_token(
    transposed: bool, form: str, block: tuple[int, int], n: int, trainable: int, at_once: int
) -> None:
    """Read as codes or decoded before; trainable slots are plain numbers; of all launches one clears."""
    r = rows((5, 2, 19, 0, 3), 7)
    N, K = (96, 40) if transposed else (40, 96)
    left, bias = unwritten(len(r.tokens_R), K), None if transposed else normal(5, N, seed=3)
    left[: r.count] = normal(r.count, K, seed=2)
    whole = normal(5, K, N, seed=1) if transposed else normal(5, N, K, seed=1)
    w, decoded = coded(whole, trainable, form, block, at_once=at_once)
    direct = one_choice(r, 41, 1)
    out, how = unwritten(41, N), {"schedule": r.schedule, "tile": replace(DESCRIPTORS, n=n, k=n), "direct": direct}
    if transposed:
        decoded = decoded.transpose(1, 2)
        run(input_gradient(left, w, out, **how))
    else:
        run(down(left, w, stored(bias, trainable), out, **how))
    want = torch.zeros(41, N, dtype=torch.float64)
    token_N = direct.tokens_R[: r.count]
    want[token_N] = direct.weights_TK.double()[token_N] * per_row(left[: r.count], decoded, r.slot_N, bias)
    assert_near(out, want, "tokens")


@TILES
def test_reruns_and_a_slot_alone_have_the_same_bits(tile: Tile) -> None:
    """Slot 2 of five runs alone, its rows in other tiles and its matrix in another place."""
    r, left, w, bias = problem(EMPTY_SLOTS, 40, 24)
    first = solve(r, left, w, bias, tile=tile, trainable=2)[: r.count]
    assert torch.equal(first, solve(r, left, w, bias, tile=tile, trainable=2)[: r.count])
    mine = r.slot_N == 2
    alone = rows([19], 7)
    lone = solve(alone, left[: r.count][mine], w[2:3], bias[2:3], tile=tile)
    assert torch.equal(first[mine], lone[: alone.count])


@BOTH_WAYS
@pytest.mark.parametrize("counts", [EMPTY_SLOTS, CROWDED, (0, 1), (0, 0)])
@pytest.mark.parametrize("programs", [1, 2, 5, 1000])
def test_tiles_one_after_the_other_have_the_bits_of_tiles_apart(
    transposed: bool, counts: Sequence[int], programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the chip: of one program, of two that share tiles unequally, and of more programs than tiles."""
    r, left, w, bias = problem(counts, 72, 40)
    how = {"trainable": 1, "transposed": transposed}
    bias = None if transposed else bias
    apart = solve(r, left, w, bias, tile=DESCRIPTORS, **how)
    monkeypatch.setattr(persistent, "_processors", lambda device: programs)
    program_order.install(monkeypatch.setattr, program_order.ORDERS["reversed"])
    assert torch.equal(solve(r, left, w, bias, tile=IN_TURN, **how)[: r.count], apart[: r.count])


def test_what_is_not_one_product_of_described_operands_has_a_program_a_tile() -> None:
    """Codes, adapters, tokens of one choice: each would put a choice between the two loops."""
    r, left, w, _ = problem(EMPTY_SLOTS, 40, 24)
    out = unwritten(len(r.tokens_R), 40)
    how = {"schedule": r.schedule, "tile": IN_TURN}
    term = RankTerm(unwritten(len(r.tokens_R), 4), unwritten(5, 40, 4), torch.ones(5))
    codes, _ = coded(normal(5, 96, 96, seed=1), 2, "int8", (1, 32))
    ways = {
        "plain": down(left, stored(w, 2), None, out, **how),
        "adapters": down(left, stored(w, 2), None, out, term=term, **how),
        "one choice": down(left, stored(w, 2), None, out, direct=one_choice(r, 41, 1), **how),
        "codes": down(unwritten(len(r.tokens_R), 96), codes, None, unwritten(len(r.tokens_R), 96), **how),
    }
    found = {name: [launch.kernel.fn.__name__ for launch in launches] for name, launches in ways.items()}
    assert found.pop("plain") == ["_persistent_kernel"]
    assert found == {"adapters": ["_rows_kernel"], "one choice": ["_rows_kernel"], "codes": ["_rows_kernel"] * 2}
