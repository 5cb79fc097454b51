"""ExpertScores: invariant 6, the other sums, and how they add up."""

from __future__ import annotations

import pytest
import torch
from expert_cases import importance, leaves, names, problem, run, solve, truth
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe_kernels import ExpertScores, Routing, SlotMap, moe_mlp
from fedmoe_kernels.activations import ACTIVATIONS
from fedmoe_kernels.cpu import loops as cpu

FIELDS = ("rows_B", "taylor_B", "taylor_abs_B", "fisher_B", "taylor_in_B", "grad_sq_B", "reap_B")


def assert_sums(scores: ExpertScores, want: dict[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    """Each field against the reference, relative to the largest slot: single slots may cancel to nothing."""
    for name in FIELDS:
        got = getattr(scores, name).double()
        error = float((got - want[name].detach()).abs().max())
        assert error <= tolerance * float(want[name].detach().abs().max()), f"{name}: off by {error:.1e}"


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_inv6_sums_equal_reference(activation: str, biases: bool) -> None:
    p = problem(21, 9, 7, 5, 2, activation=activation, biases=biases, routes="gaps")
    scores = ExpertScores(5)
    solve(p, scores=scores)
    assert_sums(scores, importance(p))


def inner(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).flatten(1).sum(1)


@pytest.mark.parametrize("trainable", [0, 2, 5])
@pytest.mark.parametrize("biases", [False, True])
def test_inv6_identities_hold_for_frozen_slots(biases: bool, trainable: int) -> None:
    """Against what dW would have been, which the reference knows because it trains every slot."""
    p = problem(33, 8, 6, 5, 2, biases=biases, routes="gaps")
    scores = ExpertScores(5)
    solve_frozen = leaves(p)
    run(p, solve_frozen, frozen_from=trainable, scores=scores).backward(p.dy_TH)
    t, d = p.tensors, truth(p)
    down, up = inner(t["w_out"], d["dw_out"]), inner(t["w_in"], d["dw_in"])
    if biases:
        down, up = down + inner(t["bias_out"], d["dbias_out"]), up + inner(t["bias_in"], d["dbias_in"])
    assert torch.allclose(scores.taylor_B.double(), down, rtol=1e-5, atol=1e-5)
    assert torch.allclose(scores.taylor_in_B.double(), up, rtol=1e-5, atol=1e-5)
    grad_sq = inner(d["dw_in"], d["dw_in"]) + inner(d["dw_out"], d["dw_out"])
    grad_sq[trainable:] = 0
    assert torch.allclose(scores.grad_sq_B.double(), grad_sq, rtol=1e-6)


def test_inv6_frozen_by_mask_and_by_shape_agree() -> None:
    p = problem(33, 8, 6, 5, 2)
    by_mask, by_shape = ExpertScores(5), ExpertScores(5)
    solve(p, trainable_B=torch.arange(5) < 2, scores=by_mask)
    solve(p, frozen_from=2, scores=by_shape)
    assert torch.equal(by_mask.leaf_B7.grad, by_shape.leaf_B7.grad)
    assert_sums(by_mask, importance(p, torch.arange(5) < 2))


def test_inv6_with_adapters() -> None:
    p = problem(33, 8, 6, 5, 2, rank=3, biases=True)
    scores = ExpertScores(5)
    solve(p, scores=scores)
    assert_sums(scores, importance(p))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 20), st.integers(1, 6), st.integers(1, 3), st.sampled_from(["uniform", "gaps"]), st.integers(0, 999)
)
def test_inv6_any_size(T: int, B: int, K: int, routes: str, seed: int) -> None:
    p = problem(T, 5, 4, B, min(K, B), routes=routes, seed=seed)
    scores = ExpertScores(B)
    solve(p, scores=scores)
    assert_sums(scores, importance(p))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype: torch.dtype) -> None:
    p = problem(64, 24, 16, 4, 2).rounded(dtype)
    scores = ExpertScores(4)
    solve(p, dtype, scores=scores)
    assert scores.leaf_B7.grad.dtype == torch.float32
    assert_sums(scores, importance(p), 1e-5 if dtype == torch.float32 else 2e-2)


def test_sums_do_not_depend_on_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(64, 8, 6, 4, 2)
    whole, cut = ExpertScores(4), ExpertScores(4)
    solve(p, scores=whole)
    monkeypatch.setattr(cpu, "tile_rows", lambda inner: 7)
    solve(p, scores=cut)
    assert torch.allclose(whole.leaf_B7.grad, cut.leaf_B7.grad, rtol=1e-6)


def test_micro_batches_add_up_and_reset_forgets() -> None:
    """Two backwards add all their sums; grad_sq adds ||dW||^2 of each, not the square of the sum."""
    first, second = problem(12, 6, 4, 3, 2, seed=1), problem(20, 6, 4, 3, 2, seed=2)
    scores = ExpertScores(3)
    assert not scores.taylor_B.any()
    for p in (first, second):
        solve(p, scores=scores)
    both = [importance(p) for p in (first, second)]
    assert_sums(scores, {name: both[0][name] + both[1][name] for name in FIELDS})
    assert (
        scores.rows_B.tolist()
        == (torch.bincount(first.slots_TK.flatten()) + second.slots_TK.flatten().bincount()).tolist()
    )
    scores.reset()
    assert not any(getattr(scores, name).any() for name in FIELDS)


def test_scores_alone_make_the_backward_run() -> None:
    """A fully frozen model still measures its experts: the leaf is all that asks for a gradient."""
    p = problem(12, 6, 4, 3, 2)
    leaf = {n: t.detach() for n, t in leaves(p).items()}
    scores = ExpertScores(3)
    run(p, leaf, scores=scores).backward(p.dy_TH)
    assert_sums(scores, importance(p, torch.zeros(3, dtype=torch.bool)))
    assert all(leaf[n].grad is None for n in names(p))


def test_scores_change_no_gradient() -> None:
    p = problem(12, 6, 4, 3, 2)
    with_scores, without = solve(p, scores=ExpertScores(3)), solve(p)
    assert all(torch.equal(with_scores[n], without[n]) for n in without)


def test_refuses_no_slot() -> None:
    with pytest.raises(ValueError, match="num_slots is 0"):
        ExpertScores(0)


def test_reap_is_the_norm_of_what_each_row_adds() -> None:
    """By hand: expert 0 writes (3, 4), of norm 5, and expert 1 (0, 2), each times the row's weight."""
    w_in, w_out = torch.tensor([[[1.0, 0.0]]] * 2), torch.tensor([[[3.0], [4.0]], [[0.0], [2.0]]])
    weights_TK = torch.tensor([[0.5, -0.25], [2.0, 0.0]])
    routing = Routing.from_topk(torch.tensor([[0, 1], [0, -1]]), weights_TK, SlotMap(torch.arange(2), 2))
    scores = ExpertScores(2)
    for upstream in (1.0, -3.0):  # the loss does not matter
        y_TH = moe_mlp(torch.ones(2, 2), routing, w_in, w_out, activation="relu", scores=scores)
        (upstream * y_TH).sum().backward()
    assert scores.reap_B.tolist() == [2 * (0.5 * 5 + 2 * 5), 2 * 0.25 * 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reap_needs_no_copy_of_the_outputs(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in half precision are widened a few at a time, with the same sums however many these are."""
    p, whole, cut = problem(64, 24, 16, 4, 2).rounded(dtype), ExpertScores(4), ExpertScores(4)
    solve(p, dtype, scores=whole)
    monkeypatch.setattr(cpu, "_NORM_VALUES", 100)
    solve(p, dtype, scores=cut)
    assert torch.equal(whole.reap_B, cut.reap_B)


def test_a_forward_without_gradient_measures_nothing() -> None:
    p, scores = problem(12, 6, 4, 3, 2), ExpertScores(3)
    with torch.no_grad():
        run(p, leaves(p), scores=scores)
    assert not scores.reap_B.any()


def test_an_output_that_overflows_takes_only_its_own_reap_along() -> None:
    p, scores = problem(12, 6, 4, 3, 2), ExpertScores(3)
    p.tensors["w_out"][1] *= 1e30
    solve(p, torch.float32, scores=scores)
    want = importance(p)["reap_B"]
    assert scores.reap_B[1] == 0
    torch.testing.assert_close(scores.reap_B[[0, 2]].double(), want[[0, 2]], rtol=1e-5, atol=0)
