"""The CPU body: nothing read that was not written, same bits every time, tiles, products, and the bytes it promises."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import expert_checks
import pytest
import torch
from expert_cases import assert_close, leaves, problem, solve, truth
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from fedmoe_kernels import ExpertScores, moe_mlp
from fedmoe_kernels.activations import ACTIVATIONS
from fedmoe_kernels.cpu import gemm
from fedmoe_kernels.cpu import loops as cpu
from fedmoe_kernels.cpu.slot import Expert


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor that is made without values holds NaN, or a wild index."""

    def filled(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def make_and_fill(*args: object, **kwargs: object) -> torch.Tensor:
            made = make(*args, **kwargs)
            return made.fill_(float("nan") if made.is_floating_point() else 2**40)

        return make_and_fill

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, filled(getattr(owner, name)))


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> gemm.Gemm:
    """oneDNN products whatever the processor and the size."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch has no oneDNN linear operator")
    monkeypatch.setattr(gemm, "_SMALLEST_ONEDNN_FLOPS", 2)
    return gemm.Gemm(gemm._onednn_linear)


SHAPES = {
    "places without a row": {"T": 30, "H": 16, "I": 12, "B": 5, "K": 3, "routes": "gaps"},
    "empty slots": {"T": 30, "H": 16, "I": 12, "B": 7, "K": 2, "routes": "empty"},
    "no row at all": {"T": 3, "H": 16, "I": 12, "B": 3, "K": 2, "routes": "none"},
    "one slot with all rows": {"T": 70, "H": 16, "I": 12, "B": 3, "K": 1, "routes": "one"},
}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("rows", [5, 4096])
@pytest.mark.parametrize("options", [{}, {"biases": True}, {"rank": 2}], ids=["plain", "biases", "adapters"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_inv4_nothing_is_read_before_it_is_written(
    shape: dict, options: dict, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "tile_rows", lambda inner: rows)
    p = problem(**shape, **options)
    scores = ExpertScores(shape["B"])
    got = solve(p, scores=scores)
    assert all(value.isfinite().all() for value in got.values())
    assert scores.leaf_B7.grad.isfinite().all()
    assert_close(got, truth(p), 1e-12)


@pytest.mark.usefixtures("poisoned")
def test_inv4_onednn_reads_past_a_slot_without_harm(onednn: gemm.Gemm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bucketed products read up to `slack` rows that belong to another slot, or to nobody and are NaN."""
    monkeypatch.setattr(cpu, "gemm_for", lambda dtype: onednn)
    p = problem(37, 16, 12, 4, 2, biases=True).rounded(torch.float32)
    assert_close(solve(p, torch.float32), truth(p), 1e-5)


def test_inv4_a_token_of_nan_stays_in_its_own_experts(onednn: gemm.Gemm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "gemm_for", lambda dtype: onednn)
    expert_checks.a_token_of_nan_stays_in_its_own_experts()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_inv10_rerun_gives_the_same_bits(dtype: torch.dtype) -> None:
    p = problem(300, 48, 40, 6, 3)
    first = ExpertScores(6)
    want = solve(p, dtype, scores=first)
    for _ in range(3):
        again = ExpertScores(6)
        got = solve(p, dtype, scores=again)
        assert all(torch.equal(got[n], want[n]) for n in want)
        assert torch.equal(again.leaf_B7.grad, first.leaf_B7.grad)


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_inv10_sums_over_rows_are_ordered_at_any_thread_count() -> None:
    """The combine gives each token to one thread: even its bits do not depend on how many there are."""
    p = problem(500, 64, 8, 6, 3)
    rows = p.routing(p.tensors["s"].float())
    record = cpu.HostRows(rows.weights_TK, rows.rows_TK, rows.tokens_R, rows.places_R, rows.offsets_B1.tolist())
    values_XH = torch.randn(1501, 64, generator=torch.Generator().manual_seed(0))
    values_XH[-1] = 0
    got = cpu._combine(values_XH, record, weighted=True)
    want = torch.zeros_like(got)
    for k in range(3):
        want += values_XH[rows.rows_TK[:, k]].double().mul(rows.weights_TK[:, k : k + 1].double()).float()
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)
    torch.set_num_threads(1)
    assert torch.equal(got, cpu._combine(values_XH, record, weighted=True))


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(1, 30))
def test_tiles_cover_every_row_once(counts: list[int], most: int) -> None:
    offsets = [0, *torch.tensor(counts).cumsum(0).tolist()]
    weight = torch.zeros(1, 1)
    experts = [Expert(weight, weight, None, None, None, b, None) for b in range(len(counts))]
    tiles = list(cpu._tiles(offsets, experts, most))
    assert [(t.low, t.high) for t in tiles] == [(n, min(n + most, offsets[-1])) for n in range(0, offsets[-1], most)]
    pieces = [piece for tile in tiles for piece, _ in tile.pieces]
    assert [p.start for p in pieces] == [0, *(p.stop for p in pieces)][: len(pieces)]
    assert not pieces or pieces[-1].stop == offsets[-1]
    assert all(offsets[p.slot] <= p.start < p.stop <= offsets[p.slot + 1] for p in pieces)
    assert [p.slot for p in pieces if p.first] == [b for b, count in enumerate(counts) if count]
    assert all(at == slice(p.start - tile.low, p.stop - tile.low) for tile in tiles for p, at in tile.pieces)


@given(st.integers(1, 10**6))
def test_buckets_are_few_and_near(rows: int) -> None:
    """Eight sizes an octave: oneDNN compiles few kernels, and at most an eighth (or 15 rows) is added."""
    padded = rows + gemm.slack(rows)
    assert padded - rows <= max(15, rows // 8)
    assert padded % 16 == 0
    assert padded == 16 or padded >> (padded.bit_length() - 5) << (padded.bit_length() - 5) == padded


@pytest.mark.parametrize("library", ["onednn", "torch.mm"])
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 100, 143])
def test_products(rows: int, library: str, onednn: gemm.Gemm) -> None:
    g = torch.Generator().manual_seed(rows)
    product = onednn if library == "onednn" else gemm.Gemm(None)
    buffer, w, bias = (torch.randn(*s, generator=g) for s in ((160, 24), (40, 24), (40,)))
    out = torch.full((rows, 40), float("nan"))
    product.rows_into(out, buffer, 3, w, bias_N=bias)
    want = buffer[3 : 3 + rows].double() @ w.double().t() + bias.double()
    assert_close({"rows": out}, {"rows": want}, 1e-6)
    product.rows_into(out, buffer, 3, w.t().contiguous().t())
    assert_close({"transposed": out}, {"transposed": want - bias}, 1e-6)
    d, a = torch.randn(rows, 40, generator=g), buffer[:rows]
    total = torch.full((40, 24), float("nan"))
    product.outer_into(total, d, a, add=False)
    assert_close({"outer": total}, {"outer": d.double().t() @ a.double()}, 1e-6)
    product.outer_into(total, d, a, add=True)
    assert_close({"added": total}, {"added": 2 * d.double().t() @ a.double()}, 1e-6)


BYTES = {
    "one tile": {"T": 512, "H": 64, "I": 96, "B": 4, "K": 2},
    "many tiles": {"T": 4096, "H": 128, "I": 256, "B": 8, "K": 2},
    "no gate": {"T": 512, "H": 64, "I": 96, "B": 4, "K": 2, "activation": "relu"},
    "many small slots": {"T": 1024, "H": 128, "I": 64, "B": 32, "K": 4},
    "one slot with all rows": {"T": 2048, "H": 128, "I": 128, "B": 2, "K": 1, "routes": "one"},
}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("library", ["onednn", "torch.mm"])
@pytest.mark.parametrize("shape", BYTES.values(), ids=BYTES.keys())
def test_promised_bytes_bound_the_measured_peak(
    shape: dict, library: str, recompute: bool, onednn: gemm.Gemm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "gemm_for", lambda dtype: onednn if library == "onednn" else gemm.Gemm(None))
    p = problem(**shape).rounded(torch.float32)
    leaf = leaves(p, torch.float32)
    sizes = (shape["T"], shape["T"] * shape["K"], shape["H"], shape["I"])
    gated = ACTIVATIONS[p.activation].gated
    dy_TH, routing, args = p.dy_TH.float(), p.routing(leaf["s"]), (leaf["w_in"], leaf["w_out"])
    y, forward = _peak(lambda: moe_mlp(leaf["x"], routing, *args, activation=p.activation, recompute=recompute))
    wanted = [leaf["x"], *args, routing.weights_TK]
    _, backward = _peak(lambda: torch.autograd.grad(y, wanted, dy_TH, retain_graph=True))
    promised = cpu.forward_bytes(*sizes, gated=gated, keep_z=not recompute)
    assert forward <= promised + 65536
    how = {"activation": p.activation, "recompute": recompute, "scores": ExpertScores(shape["B"])}
    assert _peak(lambda: moe_mlp(leaf["x"], routing, *args, **how))[1] <= promised + 65536
    back = cpu.backward_bytes(*sizes, gated=gated, grad_slots=shape["B"], recompute=recompute)
    assert backward <= back + 65536
    if library == "onednn" and shape["B"] == 2:
        assert promised <= 1.1 * forward
        assert back <= 1.1 * backward


def _peak(work: Callable[[], object]) -> tuple[Any, int]:
    """What work returns, and the most bytes that torch held over those held before."""
    work()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = work()
    held, most = 0, 0
    for event in sorted(recorded.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return result, most
