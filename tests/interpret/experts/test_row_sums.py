"""Gradients of routing weights and importance sums in Triton's interpreter against float64."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in a process with TRITON_INTERPRET=1", allow_module_level=True)

from backward_cases import TILE, Case, case, choices, solve, truth
from expert_cases import importance, problem
from expert_cases import truth as gradients
from forward_cases import CROWDED, EMPTY_SLOTS, assert_near, run, stored, unwritten

from fedmoe_kernels import Routing, SlotMap
from fedmoe_kernels.gpu.experts.row_sums import routing_gradient, score_sums, tile_pieces
from fedmoe_kernels.gpu.experts.storage import RowIndex, Stored
from fedmoe_kernels.gpu.experts.weight_gradient import output_blocks, weight_gradient


def sums(
    c: Case, *, biased: bool, trainable: int | None = None, squares_GN: Tensor | None = None, tile: object = TILE
) -> tuple[Tensor, Tensor]:
    """(dS, scores) by the kernels, into NaN."""
    out, w = solve(c, tile=tile), stored(c.bias_out, trainable)
    ds_TK, partial = unwritten(*c.routing.rows_TK.shape), unwritten(tile_pieces(c.schedule), 4)
    scores = unwritten(c.routing.num_slots, 6)
    bias = {"dy_TH": c.dy_TH, "bias_out": w} if biased else {}
    options = {"schedule": c.schedule, "zdz_MC": out.zdz, "sums_S4": partial}
    run(routing_gradient(out.ds, c.index, c.routing.rows_TK, ds_TK, **bias, **options))
    run(score_sums(partial, c.routing.offsets_B1, scores, schedule=c.schedule, squares_GN=squares_GN))
    return ds_TK, scores


def by_slot(value_N: Tensor, c: Case) -> Tensor:
    return torch.zeros(c.routing.num_slots, dtype=value_N.dtype).index_add_(0, c.slot_N, value_N)


def assert_right(c: Case, ds_TK: Tensor, scores_B6: Tensor, *, biased: bool, squares_B: Tensor | None = None) -> None:
    want, n = truth(c), c.count
    ds_N = want.ds_biased if biased else want.ds
    assert_near(ds_TK.flatten()[c.routing.places_R[:n]], ds_N, "dS")
    assert (ds_TK[c.routing.rows_TK < 0] == 0).all()
    taylor_N = c.routing.weights_TK.flatten()[c.routing.places_R[:n]].double() * ds_N
    columns = [taylor_N, taylor_N.abs(), taylor_N**2, want.zdz]
    sizes = [taylor_N.abs(), taylor_N.abs(), taylor_N**2, want.zdz.abs()]
    assert torch.equal(scores_B6[:, 0], c.routing.counts_B.float())
    for i, (value_N, size_N) in enumerate(zip(columns, sizes, strict=True)):
        # Terms of both signs cancel: the error is measured against their size.
        error_B = (scores_B6[:, 1 + i].double() - by_slot(value_N, c)).abs()
        assert (error_B <= 1e-5 * (by_slot(size_N, c) + 1e-30)).all(), f"column {1 + i}: {error_B.tolist()}"
    squares_B = torch.zeros(c.routing.num_slots) if squares_B is None else squares_B
    assert_near(scores_B6[:, 5], squares_B.double(), "grad_sq")


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("height", [16, 64])
def test_sums_of_every_slot(biased: bool, height: int) -> None:
    """A tile of 64 rows is two pieces; the bias is wider than a block of 128."""
    c = case(choices(EMPTY_SLOTS, 20, 2), 5, 140 if biased else 20, 37, height=height)
    squares_GN = torch.rand(3, 1100 if biased else 1)
    tile = replace(TILE, m=height)
    ds_TK, scores = sums(c, biased=biased, trainable=3, squares_GN=squares_GN, tile=tile)
    squares_B = torch.zeros(5)
    squares_B[:3] = squares_GN.sum(1)
    assert_right(c, ds_TK, scores, biased=biased, squares_B=squares_B)


@pytest.mark.parametrize(
    ("counts", "tokens", "k"),
    [
        pytest.param((0, 150, 0), 150, 1, id="one slot with all rows"),
        pytest.param(CROWDED, 40, 3, id="many places without a row"),
        pytest.param((0, 0, 1), 1, 1, id="one token"),
        pytest.param((0, 0, 0), 5, 2, id="no row at all"),
    ],
)
@pytest.mark.parametrize("trainable", [None, 0, 1])
def test_routings(counts: tuple[int, ...], tokens: int, k: int, trainable: int | None) -> None:
    c = case(choices(counts, tokens, k), 3, 8, 16)
    assert_right(c, *sums(c, biased=True, trainable=trainable), biased=True)


def test_without_tokens_all_scores_are_zero() -> None:
    c = case(torch.empty(0, 2, dtype=torch.int64), 3, 8, 16)
    ds_TK, scores = sums(c, biased=True)
    assert ds_TK.shape == (0, 2)
    assert (scores == 0).all()


def test_either_result_alone() -> None:
    c = case(choices((5, 4), 9, 1), 2, 8, 16)
    ds_TK, scores = sums(c, biased=False)
    out = solve(c)
    only = torch.full_like(ds_TK, torch.nan, dtype=torch.float64)
    run(routing_gradient(out.ds, c.index, c.routing.rows_TK, only, schedule=c.schedule))
    assert torch.equal(only.float(), ds_TK)
    partial, again = unwritten(tile_pieces(c.schedule), 4), torch.full_like(scores, torch.nan)
    options = {"schedule": c.schedule, "zdz_MC": out.zdz, "sums_S4": partial}
    run(routing_gradient(out.ds, c.index, c.routing.rows_TK, None, **options))
    run(score_sums(partial, c.routing.offsets_B1, again, schedule=c.schedule))
    assert torch.equal(again, scores)


def test_slots_that_share_a_base_share_its_bias() -> None:
    c = case(choices((3, 4, 5), 6, 2), 3, 12, 16)
    base_of_slot_B = torch.tensor([1, 0, 1])
    merged = replace(c, bias_out=c.bias_out[:2][base_of_slot_B])
    w = stored(c.bias_out[:2], 1)
    ds_TK = unwritten(6, 2)
    options = {"schedule": c.schedule, "dy_TH": c.dy_TH}
    shared = Stored(w.trainable, w.frozen, None, base_of_slot_B)
    run(routing_gradient(solve(c).ds, c.index, c.routing.rows_TK, ds_TK, bias_out=shared, **options))
    assert_near(ds_TK.flatten()[c.routing.places_R[: c.count]], truth(merged).ds_biased, "dS")


def test_inv10_reruns_and_the_neighbors_change_no_bit() -> None:
    slots_TK = choices((5, 18, 9, 20), 26, 2)
    c = case(slots_TK, 4, 20, 16)
    first, again = sums(c, biased=True), sums(c, biased=True)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    alone = case(torch.where((slots_TK == 1) | (slots_TK == 2), slots_TK, -1), 4, 20, 16)
    start, stop = int(c.routing.offsets_B1[1]), int(c.routing.offsets_B1[3])
    alone.z_RF[: stop - start] = c.z_RF[start:stop]
    ds_TK, scores = sums(replace(alone, dy_TH=c.dy_TH), biased=True)
    mine = alone.routing.rows_TK >= 0
    assert torch.equal(ds_TK[mine], first[0][mine])
    assert torch.equal(scores[1:3], first[1][1:3])


@pytest.mark.parametrize("activation", ["swiglu", "swiglu_oai", "relu"])
def test_inv06_importance_identities_hold_for_frozen_slots(activation: str) -> None:
    """All but one slot frozen: the sums still equal <W, dW> + <b, db> of what the gradients would have been."""
    p = problem(11, 20, 16, 4, 2, activation=activation, biases=True, routes="gaps").rounded(torch.float32)
    t, want = p.tensors, gradients(p)
    routing = Routing.from_topk(p.slots_TK, t["s"].float(), SlotMap(torch.arange(4), 4))
    token_N = routing.tokens_R[routing.tokens_R >= 0]
    slot_N = torch.repeat_interleave(torch.arange(4), routing.counts_B)
    z_N = torch.einsum("nh,nfh->nf", t["x"][token_N], t["w_in"][slot_N]) + t["bias_in"][slot_N]
    c = case(p.slots_TK, 4, 20, 16, activation=activation)
    c.z_RF[: len(z_N)] = z_N.float()
    given = {"dy_TH": p.dy_TH.float(), "w_out": t["w_out"].float(), "bias_out": t["bias_out"].float()}
    c = replace(c, routing=routing, **given)

    out, F = solve(c, trainable=1), t["w_in"].shape[1]
    down, up = output_blocks(20, 16, TILE), output_blocks(F, 20, TILE)
    squares_GN = unwritten(1, down + up)
    dw_out, dw_in = unwritten(1, 20, 16), unwritten(1, F, 20)
    x, options = t["x"].float(), {"offsets_B1": routing.offsets_B1, "tile": TILE}
    tokens_R, squares_out, squares_in = routing.tokens_R, squares_GN[:, :down], squares_GN[:, down:]
    run(weight_gradient(c.dy_TH, out.sh, dw_out, left_tokens=tokens_R, squares_GN=squares_out, **options))
    run(weight_gradient(out.dz, x, dw_in, right_tokens=tokens_R, squares_GN=squares_in, **options))
    assert_near(dw_out, want["dw_out"][:1], "dW_out")
    assert_near(dw_in, want["dw_in"][:1], "dW_in")
    _, scores = sums(c, biased=True, trainable=1, squares_GN=squares_GN)

    taylor_B = (t["w_out"] * want["dw_out"]).sum((1, 2)) + (t["bias_out"] * want["dbias_out"]).sum(1)
    taylor_in_B = (t["w_in"] * want["dw_in"]).sum((1, 2)) + (t["bias_in"] * want["dbias_in"]).sum(1)
    assert_near(scores[:, 1], taylor_B, "sum of s * dS")
    assert_near(scores[:, 4], taylor_in_B, "sum of <z, dz>")
    reference = importance(p, torch.arange(4) < 1)
    for i, name in enumerate(("rows_B", "taylor_B", "taylor_abs_B", "fisher_B", "taylor_in_B", "grad_sq_B")):
        assert_near(scores[:, i], reference[name], name)


def test_weights_may_be_wider_than_float32() -> None:
    """A float64 router beside float32 experts."""
    c = case(choices((5, 4), 9, 1), 2, 8, 16)
    wide = replace(c.routing, weights_TK=c.routing.weights_TK.double())
    ds_TK = unwritten(9, 1, dtype=torch.float64)
    index = RowIndex(wide.tokens_R, wide.places_R, wide.weights_TK)
    run(routing_gradient(solve(replace(c, routing=wide)).ds, index, wide.rows_TK, ds_TK, schedule=c.schedule))
    assert_near(ds_TK.flatten()[wide.places_R[: c.count]], truth(c).ds, "dS")
