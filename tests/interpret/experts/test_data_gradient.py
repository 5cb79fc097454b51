"""The gradient of the pre-activations in Triton's interpreter against float64 autograd."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in a process with TRITON_INTERPRET=1", allow_module_level=True)

from backward_cases import TILE, Case, Outputs, case, choices, solve, truth
from forward_cases import CROWDED, EMPTY_SLOTS, STORED, assert_near, coded, normal, run, stored, unwritten

from fedmoe_kernels.activations import ACTIVATIONS
from fedmoe_kernels.gpu.experts.data_gradient import data_gradient
from fedmoe_kernels.gpu.experts.storage import RankTerm, Stored

DESCRIPTORS = replace(TILE, tma=True)


def assert_right(c: Case, out: Outputs, added_NI: Tensor | None = None) -> None:
    """Every output by name on the rows, and nothing written past them; `added_NI` as in `truth`."""
    want, n = truth(c, added_NI), c.count
    assert_near(out.dz[:n], want.dz, "dz")
    assert_near(out.sh[:n], want.sh, "sh")
    assert_near(out.ds[:n].double().sum(1), want.ds, "ds")
    table = c.schedule.table_M4
    for tile, (slot, first, stop, _) in enumerate(table.tolist()):
        if slot < 0:
            assert out.zdz[tile].isnan().all(), "partial sums of an unused tile"
            continue
        rows = want.zdz[first : min(stop, first + c.schedule.height)]
        # A sum of terms of both signs: its error is measured against their size.
        assert abs(float(out.zdz[tile].double().sum() - rows.sum())) <= 1e-5 * (1 + float(rows.abs().sum())), "zdz"
    for name in ("dz", "sh", "ds"):
        assert getattr(out, name)[n:].isnan().all(), f"{name} past the last row"


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_output_equals_autograd(activation: str, tma: bool) -> None:
    # 20 and 36 are no multiples of 16, but their rows are of 16 bytes, as descriptors need; 21 and 37 are not even.
    H, inner = (20, 36) if tma else (21, 37)
    c = case(choices(EMPTY_SLOTS, 20, 2), 5, H, inner, activation=activation)
    assert_right(c, solve(c, tile=DESCRIPTORS if tma else TILE, trainable=2))


@pytest.mark.parametrize("split", [1, 2, 4, 8])
def test_the_pieces_of_the_epilogue_change_no_bit(split: int) -> None:
    c = case(choices((20, 3), 23, 1), 2, 16, 35)
    one, other = solve(c, tile=replace(TILE, split=1)), solve(c, tile=replace(TILE, split=split))
    assert_right(c, other)
    assert torch.equal(one.dz[: c.count], other.dz[: c.count])
    assert torch.equal(one.sh[: c.count], other.sh[: c.count])


@pytest.mark.parametrize(
    ("counts", "tokens", "k"),
    [
        pytest.param(CROWDED, 37, 1, id="one slot with all rows"),
        pytest.param((0, 0, 1), 1, 1, id="one token"),
        pytest.param((1, 0, 1), 1, 4, id="one token with two of four choices"),
        pytest.param((0, 0, 0), 5, 2, id="no row at all"),
        pytest.param((16, 16, 16), 16, 3, id="whole tiles"),
    ],
)
@pytest.mark.parametrize("trainable", [None, 0, 3])
def test_routings(counts: tuple[int, ...], tokens: int, k: int, trainable: int | None) -> None:
    c = case(choices(counts, tokens, k), 3, 16, 20)
    for tile in (TILE, DESCRIPTORS):
        assert_right(c, solve(c, tile=tile, trainable=trainable))


def test_without_tokens_nothing_is_launched() -> None:
    c = case(torch.empty(0, 2, dtype=torch.int64), 3, 16, 20)
    solve(c)
    assert c.schedule.tiles == 0


def test_slots_that_share_a_base_read_its_matrix() -> None:
    c = case(choices((3, 4, 5, 6), 9, 2), 4, 12, 20)
    base_of_slot_B = torch.tensor([1, 0, 2, 1])
    own = stored(c.w_out[:3], 2)
    shared = Stored(own.trainable, own.frozen, None, base_of_slot_B)
    merged = replace(c, w_out=c.w_out[:3][base_of_slot_B])
    for tile in (TILE, DESCRIPTORS):
        assert_right(merged, solve(merged, tile=tile, w=shared))


def test_outputs_that_are_not_wanted_are_not_needed() -> None:
    c = case(choices((5, 7), 12, 1), 2, 12, 20)
    whole = solve(c)
    dz = torch.full_like(whole.dz, torch.nan)
    nothing = {"sh_RI": None, "ds_RC": None, "zdz_MC": None}
    options = {"activation": c.activation, "schedule": c.schedule, "tile": TILE}
    run(data_gradient(c.dy_TH, c.z_RF, c.index, stored(c.w_out, None), dz_RF=dz, **nothing, **options))
    assert torch.equal(dz, whole.dz)
    ds = torch.full_like(whole.ds, torch.nan)
    nothing = {"dz_RF": None, "sh_RI": None, "zdz_MC": None}
    run(data_gradient(c.dy_TH, c.z_RF, c.index, stored(c.w_out, None), ds_RC=ds, **nothing, **options))
    assert torch.equal(ds, whole.ds)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("where", ["a weight", "a token"])
@pytest.mark.parametrize("inner", [19, 24, 32])
def test_what_is_masked_enters_no_sum_even_where_it_is_nan(inner: int, where: str) -> None:
    """Beyond the rows and columns 0 * inf is NaN; all else here is positive, so that every sum is inf and none NaN."""
    c = case(choices((5,), 5, 1), 1, 16, inner, activation="relu")
    c = replace(c, dy_TH=c.dy_TH.abs(), w_out=c.w_out.abs(), z_RF=c.z_RF.abs())
    c.routing.weights_TK.abs_()
    if where == "a weight":
        c.w_out[0, 3, 2] = torch.inf
    else:
        c.dy_TH[:, 7] = torch.inf
    out = solve(c)
    assert (out.ds[:5].sum(1) == torch.inf).all()
    assert out.zdz.sum() == torch.inf


@pytest.mark.parametrize("rank", [4, 16, 20, 70])
@pytest.mark.parametrize("tma", [False, True])
def test_adapters_add_their_term_on_the_slots_that_have_one(rank: int, tma: bool) -> None:
    """Two of four slots have one; the rank-sized rows of the others are never read. 70 takes two products."""
    c = case(choices((5, 18, 0, 4), 14, 2), 4, 20, 36)
    n, adapted = c.count, c.slot_N < 2
    rows_Rr, factor = unwritten(len(c.z_RF), rank), normal(2, rank, 36, seed=11) / rank**0.5
    rows_Rr[:n][adapted] = normal(int(adapted.sum()), rank, seed=12)
    scale_B = torch.tensor([0.7, -2.0], dtype=torch.float64)
    added_NI = torch.zeros(n, 36, dtype=torch.float64)
    own_N = c.slot_N[adapted]
    product = torch.einsum("nr,nri->ni", rows_Rr[:n][adapted].double(), factor.double()[own_N])
    added_NI[adapted] = scale_B[own_N, None] * product
    tile, term = DESCRIPTORS if tma else TILE, RankTerm(rows_Rr, factor, scale_B)
    assert_right(c, solve(c, tile=tile, trainable=0, term=term), added_NI)


@pytest.mark.parametrize(("form", "block", "n", "trainable"), STORED)
@pytest.mark.parametrize("at_once", [0, 2])
def test_frozen_slots_as_codes(form: str, block: tuple[int, int], n: int, trainable: int, at_once: int) -> None:
    """Blocks of n within a group, of whole groups, and of groups that no power of two divides; or decoded before.

    Codes take a launch of their own with narrower blocks, so that rows of plain slots have sums that it never fills.
    """
    c = case(choices((5, 18, 0, 4), 14, 2), 4, 24, 96)
    w, decoded = coded(c.w_out, trainable, form, block, at_once=at_once)
    out = solve(c, tile=replace(TILE, n=n, split=n // 16), w=w)
    assert_right(replace(c, w_out=decoded), out)
    assert out.ds[: c.count].isfinite().all()


def test_adapters_over_coded_matrices_that_slots_share() -> None:
    c = case(choices((5, 6, 7), 9, 2), 3, 20, 32)
    own, decoded = coded(c.w_out[:2], 0, "int4", (1, 32))
    base_of_slot_B = torch.tensor([1, 0, 1])
    term = RankTerm(normal(len(c.z_RF), 4, seed=1), normal(3, 4, 32, seed=2), torch.ones(3))
    added_NI = torch.einsum("nr,nri->ni", term.rows_Rr[: c.count].double(), term.factor.double()[c.slot_N])
    merged = replace(c, w_out=decoded[base_of_slot_B])
    assert_right(merged, solve(merged, w=own._replace(base_of_slot_B=base_of_slot_B), term=term), added_NI)


@pytest.mark.parametrize("tma", [False, True])
def test_inv10_reruns_and_the_neighbors_change_no_bit(tma: bool) -> None:
    """A client's slots give the same bits alone, in a cohort, and beside a client whose weights are NaN."""
    tile = DESCRIPTORS if tma else TILE
    slots_TK = choices((5, 18, 9, 20), 26, 2)
    c = case(slots_TK, 4, 20, 36)
    first, again = solve(c, tile=tile), solve(c, tile=tile)
    for name in ("dz", "sh", "ds", "zdz"):
        assert torch.equal(getattr(first, name).nan_to_num(9), getattr(again, name).nan_to_num(9)), name

    alone = case(torch.where((slots_TK == 1) | (slots_TK == 2), slots_TK, -1), 4, 20, 36)
    start, stop = int(c.routing.offsets_B1[1]), int(c.routing.offsets_B1[3])
    alone.z_RF[: stop - start] = c.z_RF[start:stop]
    w_out = c.w_out.clone()
    w_out[0], w_out[3] = torch.nan, torch.nan
    beside = solve(replace(c, w_out=w_out), tile=tile)
    one = solve(replace(alone, dy_TH=c.dy_TH, w_out=w_out), tile=tile)
    for name in ("dz", "sh", "ds"):
        mine = getattr(first, name)[start:stop]
        assert mine.isfinite().all()
        assert torch.equal(getattr(one, name)[: stop - start], mine), name
        assert torch.equal(getattr(beside, name)[start:stop], mine), name
    tiles = slice(*c.schedule.first_tile_B1[[1, 3]].tolist())
    assert torch.equal(one.zdz[alone.schedule.first_tile_B1[1] : alone.schedule.first_tile_B1[3]], first.zdz[tiles])
