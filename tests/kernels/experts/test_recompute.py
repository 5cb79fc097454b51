"""The recompute dial: nothing kept between forward and backward, the same bits, and the memory that was promised."""

from __future__ import annotations

import pytest
import torch
from expert_cases import leaves, problem, run, sent_back

from fedmoe_kernels import ExpertScores, moe_mlp
from fedmoe_kernels.cpu import loops as cpu


def solved(options: dict, dtype: torch.dtype, *, recompute: bool, **more: object) -> dict[str, torch.Tensor]:
    p = problem(61, 24, 16, 5, 2, routes="gaps", **options).rounded(dtype)
    scores, leaf = ExpertScores(5), leaves(p, dtype)
    got = sent_back(p, leaf, run(p, leaf, scores=scores, recompute=recompute, **more))
    return got | {"scores": scores.leaf_B7.grad}


@pytest.mark.parametrize("rows", [7, 4096])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"biases": True, "activation": "swiglu_oai"}, {"rank": 2}])
def test_same_bits_as_with_z_kept(
    options: dict, dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "tile_rows", lambda inner: rows)
    kept, again = (solved(options, dtype, recompute=recompute) for recompute in (False, True))
    assert all(torch.equal(kept[n], again[n]) for n in kept)


@pytest.mark.parametrize("recompute", [False, True])
def test_keeps_no_activations(recompute: bool) -> None:
    p = problem(13, 8, 6, 3, 2)
    saved: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        run(p, leaves(p), recompute=recompute)
    assert ((26, 12) in saved) != recompute


@pytest.mark.parametrize("recompute", [False, True])
def test_keeps_one_index_of_the_rows(recompute: bool) -> None:
    """Of the routing the weight and the row of every place: 12 bytes; which place a row is, the backward finds out."""
    p = problem(13, 8, 6, 3, 2)
    leaf, saved = leaves(p), {}
    routing = p.routing(leaf["s"])
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.update({t.data_ptr(): t}) or t, lambda t: t):
        moe_mlp(leaf["x"], routing, leaf["w_in"], leaf["w_out"], recompute=recompute, activation=p.activation)
    kept = sorted(t.nbytes for t in saved.values() if t.dtype == torch.int64)
    assert kept == sorted([routing.rows_TK.nbytes, routing.offsets_B1.nbytes])
    z = 0 if recompute else 26 * 12
    floats = [leaf["x"], leaf["w_in"], leaf["w_out"], routing.weights_TK]
    assert sum(t.numel() for t in saved.values() if t.is_floating_point()) == z + sum(t.numel() for t in floats)


def test_one_gradient_alone() -> None:
    p = problem(13, 8, 6, 3, 2)
    for wanted in ("x", "s", "w_in", "w_out"):
        got = []
        for recompute in (False, True):
            leaf = {n: t.detach().requires_grad_(n == wanted) for n, t in leaves(p).items()}
            run(p, leaf, recompute=recompute).backward(p.dy_TH)
            got.append(leaf[wanted].grad)
        assert torch.equal(*got)
