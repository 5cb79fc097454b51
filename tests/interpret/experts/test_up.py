"""The up-projection in Triton's interpreter against float64."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in a process with TRITON_INTERPRET=1", allow_module_level=True)

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

from fedmoe_kernels import reference
from fedmoe_kernels.activations import ACTIVATIONS
from fedmoe_kernels.gpu.experts.storage import RankTerm, Stored
from fedmoe_kernels.gpu.experts.up import up
from fedmoe_kernels.tiles.lookup import Tile


def problem(counts: Sequence[int], H: int, F: int, tokens: int = 7) -> tuple[Rows, Tensor, Tensor, Tensor]:
    """(rows, x, w_in, bias_in) with O(1) pre-activations, some beyond the clamps of swiglu_oai.

    Whatever no row needs is NaN: the matrices of empty slots, which lie between the others, and unused tokens.
    """
    B, r = len(counts), rows(counts, tokens)
    x, w_in, bias = normal(tokens, H, seed=2), normal(B, F, H, seed=1) * (3 / H**0.5), normal(B, F, seed=3) * 3
    empty_B = torch.tensor(counts) == 0
    w_in[empty_B], bias[empty_B] = torch.nan, torch.nan
    x[~torch.isin(torch.arange(tokens), r.tokens_R)] = torch.nan
    return r, x, w_in, bias


def solve(
    r: Rows, x: Tensor, w_in: Tensor, bias: Tensor | None, *, activation: str, tile: Tile, trainable: int | None
) -> tuple[Tensor, Tensor]:
    """(z, h) by the kernel, NaN wherever it wrote nothing."""
    F = w_in.shape[1]
    intermediate = F // 2 if ACTIVATIONS[activation].gated else F
    z_RF, h_RI = unwritten(len(r.tokens_R), F), unwritten(len(r.tokens_R), intermediate)
    run(
        up(
            x,
            r.tokens_R,
            stored(w_in, trainable),
            None if bias is None else stored(bias, trainable),
            z_RF=z_RF,
            h_RI=h_RI,
            activation=activation,
            schedule=r.schedule,
            tile=tile,
        )
    )
    return z_RF, h_RI


def check(
    r: Rows, x: Tensor, w_in: Tensor, bias: Tensor | None, *, activation: str, tile: Tile, trainable: int | None
) -> None:
    z_RF, h_RI = solve(r, x, w_in, bias, activation=activation, tile=tile, trainable=trainable)
    want = per_row(x[r.tokens_R[: r.count]], w_in, r.slot_N, bias)
    assert_near(z_RF[: r.count], want, "z")
    assert_near(h_RI[: r.count], reference.activate(want, activation), "h")
    assert bool(z_RF[r.count :].isnan().all())
    assert bool(h_RI[r.count :].isnan().all())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_with_and_without_bias(activation: str) -> None:
    """Odd sizes: H = 40 is 2.5 steps, I = 24 is 1.5 blocks."""
    r, x, w_in, bias = problem(EMPTY_SLOTS, 40, 48 if ACTIVATIONS[activation].gated else 24)
    check(r, x, w_in, bias, activation=activation, tile=POINTERS, trainable=None)
    check(r, x, w_in, None, activation=activation, tile=POINTERS, trainable=3)


@pytest.mark.parametrize("activation", ["swiglu", "relu"])
@pytest.mark.parametrize("trainable", [None, 0, 2, 5])
def test_weights_by_descriptor(activation: str, trainable: int | None) -> None:
    r, x, w_in, bias = problem(EMPTY_SLOTS, 40, 48 if activation == "swiglu" else 24)
    check(r, x, w_in, bias, activation=activation, tile=DESCRIPTORS, trainable=trainable)


@pytest.mark.parametrize(("n", "split"), [(16, 2), (32, 4)])
@pytest.mark.parametrize("activation", ["swiglu_oai", "gelu"])
def test_an_epilogue_in_pieces_has_the_same_bits(activation: str, n: int, split: int) -> None:
    """I = 24 is a multiple of the piece but not of the block, so that the last block ends with a piece outside."""
    r, x, w_in, bias = problem(EMPTY_SLOTS, 40, 48 if activation == "swiglu_oai" else 24)
    for tile in (replace(POINTERS, n=n), replace(DESCRIPTORS, n=n)):
        whole = solve(r, x, w_in, bias, activation=activation, tile=tile, trainable=2)
        pieces = solve(r, x, w_in, bias, activation=activation, tile=replace(tile, split=split), trainable=2)
        for one, other in zip(whole, pieces, strict=True):
            assert torch.equal(one.nan_to_num(9), other.nan_to_num(9))


@pytest.mark.parametrize("tile", [POINTERS, DESCRIPTORS], ids=["pointers", "descriptors"])
@pytest.mark.parametrize(("counts", "tokens"), [(CROWDED, 5), ((0, 1), 1), ((16, 32), 40)])
def test_one_slot_with_all_rows_one_token_and_full_tiles(tile: Tile, counts: Sequence[int], tokens: int) -> None:
    r, x, w_in, bias = problem(counts, 32, 32, tokens)
    check(r, x, w_in, bias, activation="swiglu", tile=tile, trainable=1)


def adapters(r: Rows, F: int, rank: int, slots: int) -> tuple[RankTerm, Tensor]:
    """The term of the first `slots` slots and what it adds to z; the rows of the other slots are NaN."""
    factor, scale_B = normal(slots, F, rank, seed=7), torch.linspace(0.5, 2.0, slots, dtype=torch.float64)
    rows_Rr = unwritten(len(r.tokens_R), rank)
    adapted = r.slot_N < slots
    rows_Rr[: r.count][adapted] = normal(int(adapted.sum()), rank, seed=8)
    added = torch.zeros(r.count, F, dtype=torch.float64)
    slot = r.slot_N[adapted]
    added[adapted] = scale_B[slot, None] * per_row(rows_Rr[: r.count][adapted], factor, slot)
    return RankTerm(rows_Rr, stored(factor, None).trainable, scale_B), added


@pytest.mark.parametrize("tile", [POINTERS, DESCRIPTORS], ids=["pointers", "descriptors"])
@pytest.mark.parametrize(("rank", "slots", "activation"), [(4, 3, "swiglu"), (16, 5, "gelu"), (72, 1, "swiglu")])
def test_adapters_on_the_first_slots(tile: Tile, rank: int, slots: int, activation: str) -> None:
    """A rank below, of and above what one product takes; the others' slots hold NaN where an adapter would lie."""
    r, x, w_in, bias = problem(EMPTY_SLOTS, 40, 48 if activation == "swiglu" else 24)
    term, added = adapters(r, w_in.shape[1], rank, slots)
    z_RF = unwritten(len(r.tokens_R), w_in.shape[1])
    w, b = stored(w_in, 2), stored(bias, 2)
    run(up(x, r.tokens_R, w, b, z_RF=z_RF, h_RI=None, activation=activation, schedule=r.schedule, tile=tile, term=term))
    assert_near(z_RF[: r.count], per_row(x[r.tokens_R[: r.count]], w_in, r.slot_N, bias) + added, "z")
    assert bool(z_RF[r.count :].isnan().all())


@pytest.mark.parametrize(("form", "block", "k", "trainable"), STORED)
@pytest.mark.parametrize("at_once", [0, 2])
def test_frozen_slots_as_codes(form: str, block: tuple[int, int], k: int, trainable: int, at_once: int) -> None:
    """Read as codes, or decoded two slots at once; trainable slots beside them are plain numbers."""
    r, x, w_in, bias = problem((5, 2, 19, 0, 3), 96, 48)
    w, decoded = coded(w_in, trainable, form, block, at_once=at_once)
    term, added = adapters(r, 48, 4, 4)
    z_RF, h_RI = unwritten(len(r.tokens_R), 48), unwritten(len(r.tokens_R), 24)
    tile, how = replace(DESCRIPTORS, k=k), {"activation": "swiglu", "schedule": r.schedule, "term": term}
    launches = up(x, r.tokens_R, w, stored(bias, trainable), z_RF=z_RF, h_RI=h_RI, tile=tile, **how)
    pieces = -(-(5 - trainable) // at_once) if at_once else 1
    products = 1 if at_once and pieces == 1 else (trainable > 0) + pieces
    assert sum("PART" in launch.args for launch in launches) == products
    run(launches)
    want = per_row(x[r.tokens_R[: r.count]], decoded, r.slot_N, bias) + added
    assert_near(z_RF[: r.count], want, "z")
    assert_near(h_RI[: r.count], reference.activate(want, "swiglu"), "h")
    assert bool(z_RF[r.count :].isnan().all())


def test_no_token() -> None:
    r, x, w_in, bias = problem((0, 0), 16, 32, tokens=0)
    z_RF, _ = solve(r, x, w_in, bias, activation="swiglu", tile=DESCRIPTORS, trainable=None)
    assert bool(z_RF.isnan().all())
    none = Rows(r.tokens_R[:0], r.slot_N, r.schedule._replace(table_M4=r.schedule.table_M4[:0]))
    solve(none, x, w_in, bias, activation="swiglu", tile=DESCRIPTORS, trainable=None)


def test_a_float16_result_is_rounded_once() -> None:
    r, x, w_in, bias = problem(EMPTY_SLOTS, 32, 32)
    x, w_in, bias = x.half(), w_in.half(), bias.half()
    z_RF, h_RI = unwritten(len(r.tokens_R), 32, dtype=x.dtype), unwritten(len(r.tokens_R), 16, dtype=x.dtype)
    w, b = Stored(w_in), Stored(bias)
    run(up(x, r.tokens_R, w, b, z_RF=z_RF, h_RI=h_RI, activation="swiglu", schedule=r.schedule, tile=POINTERS))
    want = per_row(x[r.tokens_R[: r.count]], w_in, r.slot_N, bias)
    ulp = torch.finfo(torch.float16).eps
    near = want.abs() * ulp * 0.51 + 1e-6
    assert bool(((z_RF[: r.count].double() - want).abs() <= near).all())
    assert_near(h_RI[: r.count], reference.activate(want, "swiglu"), "h", tolerance=5e-4)


@pytest.mark.parametrize("keep", ["z", "h"])
def test_either_output_alone_has_the_same_bits(keep: str) -> None:
    r, x, w_in, bias = problem(EMPTY_SLOTS, 40, 48)
    both = solve(r, x, w_in, bias, activation="geglu", tile=POINTERS, trainable=2)
    z_RF, h_RI = unwritten(len(r.tokens_R), 48), unwritten(len(r.tokens_R), 24)
    w, b = stored(w_in, 2), stored(bias, 2)
    z, h = (z_RF, None) if keep == "z" else (None, h_RI)
    run(up(x, r.tokens_R, w, b, z_RF=z, h_RI=h, activation="geglu", schedule=r.schedule, tile=POINTERS))
    one, other = (z_RF, both[0]) if keep == "z" else (h_RI, both[1])
    assert torch.equal(one[: r.count], other[: r.count])


def test_the_base_of_a_slot_is_found_in_either_tensor() -> None:
    """Five slots over three matrices, of which one is in the first tensor and two are in the second."""
    r, x, w_in, bias = problem((5, 2, 19, 1, 3), 40, 48)
    base_of_slot_B = torch.tensor([2, 0, 1, 1, 2])
    w, b = (stored(t[:3], 1)._replace(base_of_slot_B=base_of_slot_B) for t in (w_in, bias))
    z_RF = unwritten(len(r.tokens_R), 48)
    for tile in (POINTERS, DESCRIPTORS):
        run(up(x, r.tokens_R, w, b, z_RF=z_RF, h_RI=None, activation="swiglu", schedule=r.schedule, tile=tile))
        want = per_row(x[r.tokens_R[: r.count]], w_in[base_of_slot_B], r.slot_N, bias[base_of_slot_B])
        assert_near(z_RF[: r.count], want, "z")


def test_reruns_and_a_slot_alone_have_the_same_bits() -> None:
    """Slot 2 of five runs alone, its rows in other tiles and its matrix in another place."""
    r, x, w_in, bias = problem(EMPTY_SLOTS, 40, 48)
    first = solve(r, x, w_in, bias, activation="swiglu", tile=POINTERS, trainable=2)
    again = solve(r, x, w_in, bias, activation="swiglu", tile=POINTERS, trainable=2)
    alone = rows([19], 7)
    mine = r.slot_N == 2
    alone.tokens_R[: alone.count] = r.tokens_R[: r.count][mine]
    lone = solve(alone, x, w_in[2:3], bias[2:3], activation="swiglu", tile=POINTERS, trainable=None)
    for one, other, single in zip(first, again, lone, strict=True):
        assert torch.equal(one[: r.count], other[: r.count])
        assert torch.equal(one[: r.count][mine], single[: alone.count])
