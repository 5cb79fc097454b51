"""The whole operator through the kernels, forward and backward, against the float64 reference and against itself."""

from __future__ import annotations

from dataclasses import replace

import expert_checks
import pytest
import torch
from cohort_cases import assert_clients_keep_their_bits
from expert_cases import (
    FACTORS,
    SHAPES,
    Problem,
    assert_close,
    importance,
    learned,
    leaves,
    names,
    operator_calls,
    problem,
    run,
    sent_back,
    solve,
    truth,
)

from fedmoe_core.layer.moe import MoE
from fedmoe_core.layer.routing_rule import RoutingRule
from fedmoe_kernels import ExpertLora, ExpertScores, ExpertWeights, Quantized, moe_mlp
from fedmoe_kernels.activations import ACTIVATIONS, DEFAULT_LIMITS
from fedmoe_kernels.experts import ops
from fedmoe_kernels.formats import FORMATS

TOLERANCE = 1e-5  # float32; the routing weights and every product are exact to it on O(1) data
ALL_SHAPES = {
    **SHAPES,
    "whole blocks": {"T": 32, "H": 32, "I": 16, "B": 2, "K": 2},
    "top-1 writes to token order": {"T": 19, "H": 24, "I": 12, "B": 4, "K": 1},
    "top-1 with tokens that have no row": {"T": 19, "H": 24, "I": 12, "B": 4, "K": 1, "routes": "gaps"},
}
SMALL = {"T": 13, "H": 18, "I": 12, "B": 4, "K": 2}


def by_kernels(p: Problem, **options: object) -> dict[str, torch.Tensor]:
    """y and every gradient; all of them finite, though memory is handed out as NaN."""
    got = solve(p, torch.float32, backend="triton", **options)
    assert all(value.isfinite().all() for value in got.values())
    return got


def check(p: Problem, **options: object) -> None:
    p = p.rounded(torch.float32)
    assert_close(by_kernels(p, **options), truth(p), TOLERANCE)


def check_scores(p: Problem, scores: ExpertScores, trainable_B: torch.Tensor | None = None) -> None:
    want = importance(p, trainable_B)
    columns = dict(zip(want, scores.leaf_B7.grad.unbind(1), strict=True))
    assert_close(columns, want, TOLERANCE)


@pytest.mark.parametrize("shape", ALL_SHAPES.values(), ids=ALL_SHAPES.keys())
def test_inv4_equals_the_reference(shape: dict) -> None:
    check(problem(**shape, biases=True))


@pytest.mark.parametrize("activation", [*ACTIVATIONS, "swiglu_oai:2", "swiglu_clamped:3"])
def test_inv4_every_activation(activation: str) -> None:
    p = problem(**SMALL, activation=activation, biases=activation in ("swiglu_oai", "relu"))
    # Scale the gates up so that both sides of the clamps, at 7 and at 10, are met.
    p.tensors["w_in"].mul_(4 if activation in DEFAULT_LIMITS else 1)
    check(p)


@pytest.mark.parametrize("trainable", [0, 2, 4])
def test_inv5_frozen_slots_of_expert_weights(trainable: int) -> None:
    p = problem(**SMALL, biases=True).rounded(torch.float32)
    mask_B = torch.arange(4) < trainable
    want = learned(truth(p), mask_B)
    scores = ExpertScores(4)
    assert_close(by_kernels(p, frozen_from=trainable, scores=scores), want, TOLERANCE)
    check_scores(p, scores, mask_B)


def test_inv5_trainable_mask() -> None:
    p = problem(**SMALL, biases=True).rounded(torch.float32)
    mask_B = torch.tensor([False, True, False, True])
    want = learned(truth(p), mask_B)
    scores = ExpertScores(4)
    assert_close(by_kernels(p, trainable_B=mask_B, scores=scores), want, TOLERANCE)
    check_scores(p, scores, mask_B)


@pytest.mark.parametrize("wanted", ["x", "s", "w_in", "w_out", "bias_in", "bias_out", "scores"])
def test_inv5_one_gradient_alone(wanted: str) -> None:
    """Whatever is asked for is right when nothing else is."""
    p = problem(**SMALL, biases=True).rounded(torch.float32)
    leaf = {n: t.detach().requires_grad_(n == wanted) for n, t in leaves(p, torch.float32).items()}
    scores = ExpertScores(4) if wanted == "scores" else None
    run(p, leaf, scores=scores, backend="triton").backward(p.dy_TH.float())
    if scores is None:
        assert_close({wanted: leaf[wanted].grad}, {wanted: truth(p)[f"d{wanted}"]}, TOLERANCE)
    else:
        check_scores(p, scores, torch.zeros(4, dtype=torch.bool))


@pytest.mark.parametrize("routes", ["uniform", "gaps", "empty", "none"])
def test_inv6_importance(routes: str) -> None:
    """Against autograd through the reference, and the two identities against the kernels' own weight gradients."""
    p = problem(17, 18, 12, 5, 2, biases=True, routes=routes).rounded(torch.float32)
    scores = ExpertScores(5)
    got = by_kernels(p, scores=scores)
    check_scores(p, scores)
    for column, ends in ((scores.taylor_B, "out"), (scores.taylor_in_B, "in")):
        inner = [(got[f"d{n}_{ends}"] * p.tensors[f"{n}_{ends}"]).double().flatten(1).sum(1) for n in ("w", "bias")]
        assert torch.allclose(column.double(), sum(inner), atol=1e-4)


@pytest.mark.parametrize("shape", ALL_SHAPES.values(), ids=ALL_SHAPES.keys())
def test_inv6_every_sum_for_every_shape(shape: dict) -> None:
    """REAP reads rows of the last product, or tokens where each has one choice."""
    p = problem(**shape, biases=True).rounded(torch.float32)
    scores = ExpertScores(p.B)
    by_kernels(p, scores=scores, recompute=True)
    check_scores(p, scores)


def test_forward_without_gradient() -> None:
    p = problem(**SMALL, biases=True).rounded(torch.float32)
    with torch.no_grad():
        assert_close({"y": run(p, leaves(p, torch.float32), backend="triton")}, {"y": truth(p)["y"]}, TOLERANCE)


@pytest.mark.parametrize("options", [{"biases": True}, {"K": 1}])
def test_inv10_same_bits_again_and_with_z_recomputed(options: dict) -> None:
    p = problem(**SMALL | options)
    once, again, scarce = (ExpertScores(4) for _ in range(3))
    want = by_kernels(p, scores=once)
    for other in (by_kernels(p, scores=again), by_kernels(p, scores=scarce, recompute=True)):
        assert all(torch.equal(other[n], want[n]) for n in want)
    assert torch.equal(again.leaf_B7.grad, once.leaf_B7.grad)
    assert torch.equal(scarce.leaf_B7.grad, once.leaf_B7.grad)


def test_inv10_a_client_gets_its_bits_whoever_shares_the_cohort() -> None:
    assert_clients_keep_their_bits(torch.float32)


def test_inv4_a_token_of_nan_stays_in_its_own_experts() -> None:
    expert_checks.a_token_of_nan_stays_in_its_own_experts(backend="triton")


def test_weights_of_nan_stay_with_their_slot() -> None:
    """Slots without rows hold NaN, and none of it reaches a neighbour through a block that overlaps."""
    p = problem(15, 19, 13, 6, 2, routes="empty", biases=True).rounded(torch.float32)
    want = truth(p)
    for name in ("w_in", "w_out", "bias_in", "bias_out"):
        p.tensors[name][1::2] = float("nan")
    assert_close(by_kernels(p), want, TOLERANCE)
    assert_close(by_kernels(p, frozen_from=3), learned(want, torch.arange(6) < 3), TOLERANCE)


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("shape", ["places without a row", "top-1 writes to token order", "no token"])
def test_inv4_lora(shape: str, rank: int) -> None:
    p = problem(**ALL_SHAPES[shape], rank=rank, biases=True).rounded(torch.float32)
    scores = ExpertScores(p.B)
    assert_close(by_kernels(p, scores=scores), truth(p), TOLERANCE)
    check_scores(p, scores)


def test_inv4_lora_slots_share_base_experts() -> None:
    """Two clients of a cohort, three slots each, on the same three base experts."""
    p = problem(18, 16, 12, 6, 2, rank=2, biases=True)
    shared = {n: t[:3] if n in ("w_in", "w_out", "bias_in", "bias_out") else t for n, t in p.tensors.items()}
    check(type(p)(p.slots_TK, shared, p.dy_TH, base_of_slot_B=torch.tensor([0, 1, 2, 0, 1, 2])))


def test_inv4_lora_on_some_slots_with_a_scale_each() -> None:
    expert_checks.adapters_on_some_slots_with_a_scale_each(torch.float32, "triton", TOLERANCE)


def test_inv5_mask_picks_the_adapters_that_learn() -> None:
    p = problem(**SMALL, rank=2).rounded(torch.float32)
    mask_B = torch.tensor([False, True, False, True])
    want = learned(truth(p), mask_B)
    assert_close(by_kernels(p, trainable_B=mask_B), want, TOLERANCE)


def test_lora_recomputes_the_same_bits() -> None:
    p = problem(**SMALL, rank=2)
    kept, again = by_kernels(p), by_kernels(p, recompute=True)
    assert all(torch.equal(kept[n], again[n]) for n in kept)


@pytest.mark.parametrize(
    ("form", "trainable", "rows_per_slot"),
    [*((form, 2, None) for form in FORMATS), ("int8", 0, None), ("nvfp4", 2, 640), ("nf4", 0, 192)],
)
def test_inv4_quantized_frozen_slots(form: str, trainable: int, rows_per_slot: int | None) -> None:
    p = problem(11, 64, 32, 4, 2, biases=True).rounded(torch.float32)
    codes = {n: Quantized.of(p.tensors[n][trainable:], form) for n in ("w_in", "w_out")}
    told = {n: torch.cat([p.tensors[n][:trainable], q.dequantize(torch.float64)]) for n, q in codes.items()}
    p = replace(p, tensors=p.tensors | told)
    leaf, scores = leaves(p, torch.float32), ExpertScores(4)
    stacks = {
        n: ExpertWeights(leaf[n][:trainable], codes.get(n, leaf[n][trainable:].detach()))
        for n in ("w_in", "w_out", "bias_in", "bias_out")
    }
    w_in, w_out = stacks.pop("w_in"), stacks.pop("w_out")
    routing = replace(p.routing(leaf["s"]), rows_per_slot=rows_per_slot)
    y = moe_mlp(leaf["x"], routing, w_in, w_out, **stacks, scores=scores, backend="triton")
    mask_B = torch.arange(4) < trainable
    assert_close(sent_back(p, leaf, y), learned(truth(p), mask_B), TOLERANCE)
    check_scores(p, scores, mask_B)


def test_inv4_adapters_over_shared_quantized_bases() -> None:
    p = problem(18, 32, 32, 6, 2, rank=2)
    codes = {n: Quantized.of(p.tensors[n][:3], "int4", (1, 32)) for n in ("w_in", "w_out")}
    told = {n: q.dequantize(torch.float64) for n, q in codes.items()}
    p = replace(p, tensors=p.tensors | told, base_of_slot_B=torch.tensor([0, 1, 2, 0, 1, 2])).rounded(torch.float32)
    leaf = leaves(p, torch.float32)
    w_in, w_out = (ExpertWeights(leaf[n][:0].detach(), q) for n, q in codes.items())
    lora = ExpertLora(*(leaf[n] for n in FACTORS), p.lora_scale, p.base_of_slot_B)
    y = moe_mlp(leaf["x"], p.routing(leaf["s"]), w_in, w_out, lora=lora, backend="triton")
    assert_close(sent_back(p, leaf, y), truth(p), TOLERANCE)


def test_no_choice_at_all() -> None:
    """K = 0, which a model that routes itself may send: exact zeros."""
    p = problem(5, 8, 6, 3, 1)
    p = replace(p, slots_TK=p.slots_TK[:, :0], tensors=p.tensors | {"s": p.tensors["s"][:, :0]})
    assert all((value == 0).all() for value in by_kernels(p).values())


def test_inv4_half_precision() -> None:
    p = problem(33, 32, 24, 4, 2, biases=True).rounded(torch.float16)
    assert_close(solve(p, torch.float16, backend="triton"), truth(p), 2e-3)


def test_bfloat16_is_refused_in_the_interpreter() -> None:
    p = problem(**SMALL)
    with pytest.raises(ValueError, match="bfloat16"):
        solve(p, torch.bfloat16, backend="triton")


def test_misaligned_and_turned_inputs_are_copied() -> None:
    p = problem(**SMALL).rounded(torch.float32)
    want = by_kernels(p)
    flat = torch.cat([torch.zeros(1), p.tensors["x"].float().flatten()])
    leaf = leaves(p, torch.float32) | {"x": flat[1:].view(13, 18).requires_grad_()}
    assert leaf["x"].data_ptr() % 16
    turned = leaf["w_in"].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    leaf["w_in"] = turned
    turned_dy = replace(p, dy_TH=p.dy_TH.float().t().contiguous().t())
    got = sent_back(turned_dy, leaf, run(p, leaf, backend="triton"))
    assert all(torch.equal(got[n], want[n]) for n in want)


@pytest.mark.parametrize("options", [{"biases": True}, {"rank": 2}])
def test_compile_fullgraph(options: dict) -> None:
    expert_checks.compiled_whole_has_the_same_bits(options, torch.float32, "triton")


def test_opcheck() -> None:
    p = problem(5, 8, 6, 3, 2, biases=True)
    forward, backward = operator_calls(p, leaves(p, torch.float32), scores=ExpertScores(3), backend="triton")
    torch.library.opcheck(ops.moe_mlp_op, forward)
    torch.library.opcheck(ops.moe_mlp_backward_op, backward)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_counts_scores_once(reentrant: bool) -> None:
    expert_checks.gradient_checkpointing_counts_scores_once(reentrant, torch.float32, "triton")


def test_autocast_to_half() -> None:
    p = problem(33, 32, 24, 4, 2, biases=True).rounded(torch.float16)
    leaf = leaves(p, torch.float32)
    with torch.autocast("cpu", dtype=torch.float16):
        y = run(p, leaf, backend="triton")
    assert y.dtype == torch.float16
    got = sent_back(p, leaf, y)
    assert all(leaf[n].grad.dtype == torch.float32 for n in names(p))
    assert_close(got, truth(p), 2e-3)


@pytest.mark.parametrize("scoring", ["softmax", "topk_softmax", "sigmoid"])
@pytest.mark.parametrize("trainable", [(1, 4), (), (0, 1, 4)])
def test_inv3_layer_from_router_to_experts(scoring: str, trainable: tuple[int, ...]) -> None:
    """Route and experts by kernels, next to the same layer on the slot loops in float64."""
    H, E = 16, 6
    g = torch.Generator().manual_seed(0)
    dense = [torch.randn(shape, generator=g) for shape in ((E, H), (E, 24, H), (E, H, 12))]
    x, dy = (torch.randn(2, 9, H, generator=g) for _ in range(2))
    valid = torch.arange(18) % 5 != 3
    held, trains = ([e in ids for e in range(E)] for ids in ((0, 1, 4), trainable))
    results = []
    for backend, dtype in (("triton", torch.float32), ("cpu", torch.float64)):
        masks = {"permitted": held, "trainable": trains}
        options = {**masks, "rule": RoutingRule(scoring), "with_scores": True, "with_stats": True}
        layer = MoE.from_dense(*(w.to(dtype) for w in dense), 2, backend=backend, **options)
        leaf = x.to(dtype, copy=True).requires_grad_()
        y = layer(leaf, valid)
        y.backward(dy.to(dtype))
        grads = {name: value.grad for name, value in layer.named_parameters() if value.numel()}
        stats = {"hits": layer.last_stats.hits_E, "lost": layer.last_stats.lost_mass}
        results.append({"y": y.detach(), "dx": leaf.grad, "scores": layer.scores.leaf_B7.grad, **grads, **stats})
    got, want = results
    assert (got["y"].view(18, H)[~valid] == 0).all()
    assert_close(got, {n: t.double() for n, t in want.items()}, TOLERANCE)
