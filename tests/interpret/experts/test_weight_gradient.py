"""Gradients of weights and biases in Triton's interpreter against float64."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in a process with TRITON_INTERPRET=1", allow_module_level=True)

from backward_cases import TILE, case, choices
from forward_cases import CROWDED, EMPTY_SLOTS, assert_near, normal, run, unwritten

from fedmoe_kernels.gpu.experts.weight_gradient import bias_gradient, output_blocks, weight_gradient
from fedmoe_kernels.tiles.lookup import Tile

TOKENS, ABSENT = 7, 4


def offsets_of(counts: Sequence[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(counts)])


def operand(offsets_B1: Tensor, width: int, *, gathered: bool, seed: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """(operand, row numbers, its rows in float64); NaN in what no row reads."""
    n = int(offsets_B1[-1])
    if not gathered:
        rows = normal(n + ABSENT, width, seed=seed)
        rows[n:] = torch.nan
        return rows, None, rows[:n].double()
    tokens_R = torch.full((n + ABSENT,), -1)
    tokens_R[:n] = torch.randint(TOKENS, (n,), generator=torch.Generator().manual_seed(seed))
    rows = normal(TOKENS, width, seed=seed)
    rows[~torch.isin(torch.arange(TOKENS), tokens_R)] = torch.nan
    return rows, tokens_R, rows[tokens_R[:n]].double()


def grams(left_N: Tensor, right_N: Tensor, offsets_B1: Tensor) -> Tensor:
    """left^T @ right over the rows of each slot."""
    return torch.stack([left_N[a:b].T @ right_N[a:b] for a, b in itertools.pairwise(offsets_B1.tolist())])


@pytest.mark.parametrize("gathered", ["", "left", "right", "left right"])
@pytest.mark.parametrize("counts", [EMPTY_SLOTS, CROWDED])
def test_every_slot_equals_its_own_product(counts: Sequence[int], gathered: str) -> None:
    offsets = offsets_of(counts)
    left, left_tokens, left_N = operand(offsets, 21, gathered="left" in gathered, seed=1)
    right, right_tokens, right_N = operand(offsets, 37, gathered="right" in gathered, seed=2)
    want, out = grams(left_N, right_N, offsets), unwritten(len(counts), 21, 37)
    gathers = {"left_tokens": left_tokens, "right_tokens": right_tokens}
    run(weight_gradient(left, right, out, offsets_B1=offsets, **gathers, tile=TILE))
    assert_near(out, want, "dW")
    empty_B = torch.tensor(counts) == 0
    assert (out[empty_B] == 0).all()


def check_matrix(P: int, Q: int, tile: Tile) -> None:
    """Hold a P x Q gradient of three slots, one of them empty, and its squares to float64."""
    offsets = offsets_of((5, 0, 18))
    left, _, left_N = operand(offsets, P, gathered=False, seed=1)
    right, tokens, right_N = operand(offsets, Q, gathered=True, seed=2)
    out, squares = unwritten(3, P, Q), unwritten(3, output_blocks(P, Q, tile))
    options = {"right_tokens": tokens, "tile": tile, "squares_GN": squares}
    run(weight_gradient(left, right, out, offsets_B1=offsets, **options))
    assert_near(out, grams(left_N, right_N, offsets), "dW")
    assert_near(squares.sum(1), out.double().square().sum((1, 2)), "squares")


@pytest.mark.parametrize(("P", "Q"), [(4, 40), (40, 4), (5, 3), (64, 16), (16, 64), (1, 1)])
@pytest.mark.parametrize("tile", [TILE, Tile(32, 32, 16, 1, 1)])
def test_matrices_of_any_rank(P: int, Q: int, tile: Tile) -> None:
    """A narrow side gives the columns of a block whichever it is, so that adapters use the same products."""
    check_matrix(P, Q, tile)


@pytest.mark.parametrize(("P", "Q"), [(48, 80), (80, 48), (48, 40), (33, 48), (48, 64)])
def test_a_last_block_that_overlaps_writes_and_counts_only_its_own(P: int, Q: int) -> None:
    """Sides of whole 16s end with the last block moved back; every element is one program's, in value and in square."""
    check_matrix(P, Q, Tile(32, 32, 16, 1, 1))


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_overflowed_stays_in_its_own_slot_and_column(side: str) -> None:
    """Rows past a slot's end are the last row times 0: an inf there is seen where its own term is not finite anyway."""
    offsets = offsets_of((5, 18, 16))
    left, _, _ = operand(offsets, 20, gathered=False, seed=1)
    right, _, _ = operand(offsets, 24, gathered=False, seed=2)
    whole, last = unwritten(3, 20, 24), int(offsets[2]) - 1
    run(weight_gradient(left, right, whole, offsets_B1=offsets, tile=TILE))
    (left if side == "left" else right)[last, 7] = torch.inf
    out = unwritten(3, 20, 24)
    run(weight_gradient(left, right, out, offsets_B1=offsets, tile=TILE))
    touched = torch.zeros(3, 20, 24, dtype=torch.bool)
    touched[(1, 7) if side == "left" else (1, slice(None), 7)] = True
    assert not out[touched].isfinite().any()
    assert torch.equal(out[~touched], whole[~touched])


def test_only_trainable_slots_that_learn_are_summed_and_scaled() -> None:
    """Five slots, four with gradient buffers, two of which learn: the rows of the other three may be anything."""
    offsets = offsets_of((6, 5, 17, 0, 8))
    left, _, left_N = operand(offsets, 20, gathered=False, seed=1)
    right, _, right_N = operand(offsets, 9, gathered=False, seed=2)
    learns_B = torch.tensor([True, False, True, True, False])
    scale_B = torch.tensor([0.5, 3.0, -2.0, 7.0, 1.0], dtype=torch.float64)
    want = grams(left_N, right_N, offsets)[:4] * torch.where(learns_B, scale_B, 0)[:4, None, None]
    for slot in (1, 4):
        left[offsets[slot] : offsets[slot + 1]] = torch.nan
        right[offsets[slot] : offsets[slot + 1]] = torch.nan
    blocks = output_blocks(20, 9, TILE)
    out, wide = unwritten(4, 20, 9), unwritten(4, blocks + 3)
    options = {"learns_B": learns_B, "scale_B": scale_B, "squares_GN": wide[:, 2 : 2 + blocks]}
    run(weight_gradient(left, right, out, offsets_B1=offsets, tile=TILE, **options))
    assert_near(out, want, "dW")
    assert (out[[1, 3]] == 0).all()
    assert_near(wide[:, 2 : 2 + blocks].sum(1), out.double().square().sum((1, 2)), "squares")
    assert wide[:, :2].isnan().all()
    assert wide[:, 2 + blocks :].isnan().all()


def test_squares_are_those_of_the_gradient_as_it_is_stored() -> None:
    """In half precision, of the rounded values: what the importance says is what the optimizer gets."""
    offsets = offsets_of((3, 6))
    left, _, _ = operand(offsets, 20, gathered=False, seed=1)
    right, _, _ = operand(offsets, 36, gathered=False, seed=2)
    out, squares = unwritten(2, 20, 36, dtype=torch.float16), unwritten(2, output_blocks(20, 36, TILE))
    half = (left.half(), right.half())
    run(weight_gradient(*half, out, offsets_B1=offsets, tile=TILE, squares_GN=squares))
    assert_near(squares.sum(1), out.double().square().sum((1, 2)), "squares", 1e-6)


@pytest.mark.parametrize("counts", [(0, 0, 0), (1,), ()])
def test_few_rows_or_none(counts: Sequence[int]) -> None:
    offsets = offsets_of(counts)
    left, _, left_N = operand(offsets, 17, gathered=False, seed=1)
    right, tokens, right_N = operand(offsets, 19, gathered=True, seed=2)
    out, bias = unwritten(len(counts), 17, 19), unwritten(len(counts), 17)
    run(weight_gradient(left, right, out, offsets_B1=offsets, right_tokens=tokens, tile=TILE))
    run(bias_gradient(left, bias, offsets_B1=offsets))
    if counts:
        assert_near(out, grams(left_N, right_N, offsets), "dW")
        assert_near(bias[:, None], grams(torch.ones(sum(counts), 1).double(), left_N, offsets), "db")


def test_inv10_reruns_and_the_neighbors_change_no_bit() -> None:
    offsets, tokens_R = offsets_of((5, 35, 4)), torch.randint(TOKENS, (48,))
    left, right = normal(48, 20, seed=1), normal(TOKENS, 36, seed=2)
    runs = []
    for _ in range(2):
        out, bias = unwritten(3, 20, 36), unwritten(3, 20)
        run(weight_gradient(left, right, out, offsets_B1=offsets, right_tokens=tokens_R, tile=TILE))
        run(bias_gradient(left, bias, offsets_B1=offsets))
        runs.append((out, bias))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    out, bias = unwritten(1, 20, 36), unwritten(1, 20)
    alone = offsets_of((35,))
    run(weight_gradient(left[5:], right, out, offsets_B1=alone, right_tokens=tokens_R[5:], tile=TILE))
    run(bias_gradient(left[5:], bias, offsets_B1=alone))
    assert torch.equal(out[0], runs[0][0][1])
    assert torch.equal(bias[0], runs[0][1][1])
    left[:5], left[40:] = torch.nan, torch.nan
    out = unwritten(3, 20, 36)
    run(weight_gradient(left, right, out, offsets_B1=offsets, right_tokens=tokens_R, tile=TILE))
    assert torch.equal(out[1], runs[0][0][1])


@pytest.mark.parametrize("width", [5, 130])
def test_biases_of_both_matrices(width: int) -> None:
    """db_in sums rows, db_out tokens times the routing weight; beyond 128 columns a second block."""
    c = case(choices((6, 0, 70, 3), 40, 2), 4, width, 9)
    n, offsets = c.count, c.routing.offsets_B1
    learns_B = torch.tensor([True, True, True, False])
    one_N1 = torch.ones(n, 1).double()
    dz = normal(c.z_RF.shape[0], width, seed=9)
    dz[n:] = torch.nan
    s_N = c.routing.weights_TK.flatten()[c.routing.places_R[:n]].double()
    dy_N = c.dy_TH.double()[c.routing.tokens_R[:n]] * s_N[:, None]
    for got, want in ((None, dz[:n].double()), (c.index, dy_N)):
        out = unwritten(4, width)
        values = dz if got is None else c.dy_TH
        run(bias_gradient(values, out, offsets_B1=offsets, routing=got, learns_B=learns_B))
        assert_near(out[:3], grams(one_N1, want, offsets)[:3, 0], "db")
        assert (out[[1, 3]] == 0).all()


def test_blocks_follow_the_matrix() -> None:
    wide = Tile(128, 256, 64, 8, 5)
    assert output_blocks(1536, 2048, wide) == 12 * 8
    assert output_blocks(8, 2048, wide) == output_blocks(2048, 8, wide) == 16
    assert output_blocks(17, 2048, replace(wide, n=16)) == 16 * 2
