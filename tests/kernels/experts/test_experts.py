"""moe_mlp: invariants 4 and 5, its forms of weights, its place in autograd, compile and autocast."""

from __future__ import annotations

from dataclasses import replace

import expert_checks
import pytest
import torch
from expert_cases import (
    SHAPES,
    assert_close,
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
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe_kernels import ExpertScores, ExpertWeights, Routing, SlotMap, moe_mlp
from fedmoe_kernels.activations import ACTIVATIONS, DEFAULT_LIMITS
from fedmoe_kernels.cpu import gemm
from fedmoe_kernels.cpu import loops as cpu
from fedmoe_kernels.experts import ops

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}

ALL_SHAPES = {
    **SHAPES,
    "one slot": {"T": 9, "H": 7, "I": 5, "B": 1, "K": 1},
    "top-1": {"T": 17, "H": 8, "I": 12, "B": 4, "K": 1},
    "every slot chosen by every token": {"T": 6, "H": 8, "I": 4, "B": 3, "K": 3},
}


@pytest.fixture(params=["as built", "small tiles", "onednn", "torch.mm"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The ways through the CPU body that sizes and machines choose: tiles of 5 rows, and both libraries."""
    if request.param == "small tiles":
        monkeypatch.setattr(cpu, "tile_rows", lambda inner: 5)
    if request.param == "onednn":
        if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
            pytest.skip("this torch has no oneDNN linear operator")
        monkeypatch.setattr(gemm, "_SMALLEST_ONEDNN_FLOPS", 2)
        monkeypatch.setattr(cpu, "gemm_for", lambda dtype: gemm.Gemm(gemm._onednn_linear))
    if request.param == "torch.mm":
        monkeypatch.setattr(cpu, "gemm_for", lambda dtype: gemm.Gemm(None))
    return request.param


@pytest.mark.parametrize("shape", ALL_SHAPES.values(), ids=ALL_SHAPES.keys())
def test_inv4_float32_equals_reference(shape: dict, path: str) -> None:
    p = problem(**shape, biases=True).rounded(torch.float32)
    assert_close(solve(p, torch.float32), truth(p), TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", ALL_SHAPES.values(), ids=ALL_SHAPES.keys())
def test_inv4_other_dtypes_equal_reference(shape: dict, dtype: torch.dtype) -> None:
    p = problem(**shape).rounded(dtype)
    assert_close(solve(p, dtype), truth(p), TOLERANCE[dtype])


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_inv4_every_activation(activation: str, biases: bool) -> None:
    p = problem(19, 12, 10, 4, 2, activation=activation, biases=biases)
    # Scale the gates up so that both sides of the clamps, at 7 and at 10, are met.
    p.tensors["w_in"].mul_(4 if activation in DEFAULT_LIMITS else 1)
    assert_close(solve(p), truth(p), 1e-12)
    p = p.rounded(torch.bfloat16)
    assert_close(solve(p, torch.bfloat16), truth(p), 1e-2)


def test_inv4_bf16_slot_of_many_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """12 pieces: the weight gradient is added up in bf16 piece by piece."""
    monkeypatch.setattr(cpu, "tile_rows", lambda inner: 16)
    p = problem(192, 16, 16, 2, 1, routes="one").rounded(torch.bfloat16)
    assert_close(solve(p, torch.bfloat16), truth(p), 1e-2)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 12),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 6),
    st.integers(1, 3),
    st.sampled_from(["uniform", "gaps"]),
    st.integers(0, 10**6),
)
def test_inv4_any_size(T: int, H: int, I: int, B: int, K: int, routes: str, seed: int) -> None:  # noqa: E741
    p = problem(T, H, I, B, min(K, B), routes=routes, seed=seed, biases=seed % 2 == 0)
    assert_close(solve(p), truth(p), 1e-11)


@pytest.mark.parametrize("options", [{"biases": True}, {"activation": "relu"}, {"rank": 2, "routes": "gaps"}])
def test_inv4_gradcheck(options: dict) -> None:
    p = problem(4, 3, 2, 3, 2, **options)
    leaf = leaves(p)
    inputs = [leaf[n] for n in names(p)]

    def f(*values: torch.Tensor) -> torch.Tensor:
        return run(p, leaf | dict(zip(names(p), values, strict=True)))

    assert torch.autograd.gradcheck(f, inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 4])
def test_inv4_lora_equals_reference(dtype: torch.dtype, rank: int) -> None:
    p = problem(29, 20, 12, 4, 2, rank=rank, biases=True, routes="gaps").rounded(dtype)
    assert_close(solve(p, dtype), truth(p), TOLERANCE[dtype])


def test_inv4_lora_slots_share_base_experts() -> None:
    """Two clients of a cohort, three slots each, on the same three base experts."""
    p = problem(18, 8, 6, 6, 2, rank=2)
    shared = {n: t[:3] if n in ("w_in", "w_out") else t for n, t in p.tensors.items()}
    p = type(p)(p.slots_TK, shared, p.dy_TH, base_of_slot_B=torch.tensor([0, 1, 2, 0, 1, 2]))
    assert_close(solve(p), truth(p), 1e-12)


def test_inv4_lora_on_some_slots_with_a_scale_each() -> None:
    expert_checks.adapters_on_some_slots_with_a_scale_each(torch.float64, "auto", 1e-12)


def test_inv4_reference_backend_agrees() -> None:
    mask_B = torch.tensor([True, False, True, False])
    for options in ({"biases": True}, {"rank": 2}):
        p = problem(9, 6, 5, 4, 2, **options)
        assert_close(solve(p, backend="reference", trainable_B=mask_B), solve(p, trainable_B=mask_B), 1e-12)


def test_inv5_trainable_mask_gives_zero_rows_and_changes_nothing_else() -> None:
    p = problem(24, 8, 6, 5, 2, biases=True)
    mask_B = torch.tensor([False, True, False, True, True])
    assert_close(solve(p, trainable_B=mask_B), learned(truth(p), mask_B), 1e-12)


def test_inv5_mask_picks_the_adapters_that_learn() -> None:
    p = problem(24, 8, 6, 5, 2, rank=2)
    mask_B = torch.tensor([False, True, False, True, True])
    assert_close(solve(p, trainable_B=mask_B), learned(truth(p), mask_B), 1e-12)


@pytest.mark.parametrize("trainable", [0, 2, 5])
def test_inv5_frozen_slots_have_no_gradient_tensor(trainable: int, monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(24, 8, 6, 5, 2, biases=True)
    products: list[torch.Size] = []
    outer_into = gemm.Gemm.outer_into

    def counted(self: gemm.Gemm, out_NK: torch.Tensor, *args: torch.Tensor, add: bool) -> None:
        products.append(out_NK.shape)
        outer_into(self, out_NK, *args, add=add)

    monkeypatch.setattr(gemm.Gemm, "outer_into", counted)
    leaf = leaves(p)
    stacked = ("w_in", "w_out", "bias_in", "bias_out")
    halves = {
        n: ExpertWeights(leaf[n][:trainable].detach().requires_grad_(), leaf[n][trainable:].detach()) for n in stacked
    }
    before = {n: halves[n].frozen.clone() for n in stacked}
    y = moe_mlp(leaf["x"], p.routing(leaf["s"]), halves.pop("w_in"), halves.pop("w_out"), **halves)
    y.backward(p.dy_TH)
    assert len(products) == 2 * trainable  # one w_in and one w_out each; frozen slots cost no product
    want = truth(p)
    assert_close({"dx": leaf["x"].grad, "ds": leaf["s"].grad}, {n: want[n] for n in ("dx", "ds")}, 1e-12)
    for name, weights in halves.items():
        assert weights.trainable.grad.shape[0] == trainable
        assert weights.frozen.grad is None
        assert torch.equal(weights.frozen, before[name])
        assert_close({name: weights.trainable.grad}, {name: want[f"d{name}"][:trainable]}, 1e-12)


@pytest.mark.parametrize("wanted", ["x", "s", "w_in", "w_out", "bias_in", "bias_out"])
def test_inv5_one_gradient_alone(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is asked for is right when nothing else is, and only its products are formed."""
    p = problem(13, 8, 6, 3, 2, biases=True)
    leaf = {n: t.detach().requires_grad_(n == wanted) for n, t in leaves(p).items()}
    asked: list[list[bool]] = []
    wanted_buffers = ops.wanted
    monkeypatch.setattr(ops, "wanted", lambda i, needs: asked.append(needs) or wanted_buffers(i, needs))
    run(p, leaf).backward(p.dy_TH)
    assert_close({wanted: leaf[wanted].grad}, {wanted: truth(p)[f"d{wanted}"]}, 1e-12)
    assert sum(asked[0]) == (0 if wanted == "x" else 1)


def test_no_gradient_keeps_no_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(13, 8, 6, 3, 2)
    leaf = leaves(p)
    kept: list[bool] = []
    forward = cpu.forward
    monkeypatch.setattr(
        cpu, "forward", lambda *a, keep_z, **how: kept.append(keep_z) or forward(*a, keep_z=keep_z, **how)
    )
    with torch.no_grad():
        y = run(p, leaf)
    assert kept == [False]
    assert torch.equal(y, run(p, leaf).detach())


def test_non_contiguous_inputs_are_copied() -> None:
    p = problem(12, 8, 6, 3, 2)
    want = solve(p)
    turned = {n: t.transpose(-1, -2).contiguous().transpose(-1, -2) for n, t in p.tensors.items()}
    assert not turned["w_in"].is_contiguous()
    leaf = {n: t.requires_grad_() for n, t in turned.items()}
    turned_dy = replace(p, dy_TH=p.dy_TH.t().contiguous().t())
    assert_close(sent_back(turned_dy, leaf, run(p, leaf)), want, 1e-12)


def test_expanded_upstream_gradient() -> None:
    """y.sum() sends a gradient with strides (0, 0), which kills torch's grouped_mm."""
    p = problem(12, 8, 6, 3, 2)
    p.dy_TH.fill_(1)
    leaf = leaves(p)
    run(p, leaf).sum().backward()
    assert_close({n: leaf[n].grad for n in names(p)}, {n: truth(p)[f"d{n}"] for n in names(p)}, 1e-12)


@pytest.mark.parametrize("options", [{"biases": True}, {"rank": 2}])
def test_opcheck(options: dict) -> None:
    p = problem(11, 8, 6, 3, 2, **options)
    forward, backward = operator_calls(p, leaves(p), scores=ExpertScores(3))
    torch.library.opcheck(ops.moe_mlp_op, forward)
    torch.library.opcheck(ops.moe_mlp_backward_op, backward)


@pytest.mark.parametrize("options", [{"biases": True}, {"rank": 2}])
def test_compile_fullgraph(options: dict) -> None:
    expert_checks.compiled_whole_has_the_same_bits(options, torch.float64, "auto")


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_counts_scores_once(reentrant: bool) -> None:
    expert_checks.gradient_checkpointing_counts_scores_once(reentrant, torch.float64, "auto")


def test_autocast_runs_in_bf16_and_returns_gradients_in_the_leaves_dtype() -> None:
    p = problem(64, 32, 24, 4, 2, biases=True).rounded(torch.bfloat16)
    leaf = leaves(p, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = run(p, leaf)
    assert y.dtype == torch.bfloat16
    got = sent_back(p, leaf, y)
    assert all(leaf[n].grad.dtype == torch.float32 for n in names(p))
    assert_close(got, truth(p), 1e-2)


def test_from_masked_route_to_logits() -> None:
    """The router weight's gradient flows on into whatever made the weights."""
    p = problem(16, 8, 6, 4, 2)
    logits = torch.randn(16, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    leaf = leaves(p)

    def f(logits: torch.Tensor) -> torch.Tensor:
        s = logits.softmax(-1).gather(1, p.slots_TK)
        return moe_mlp(
            leaf["x"], Routing.from_topk(p.slots_TK, s, SlotMap(torch.arange(4), 4)), leaf["w_in"], leaf["w_out"]
        )

    assert torch.autograd.gradcheck(f, (logits,))


def test_refuses_trainable_base_under_lora() -> None:
    p = problem(5, 8, 6, 3, 2, rank=2)
    leaf = leaves(p)
    with pytest.raises(ValueError, match="w_in requires a gradient under lora"):
        run(p, leaf | {"w_in": leaf["w_in"].clone().requires_grad_()})
    with pytest.raises(ValueError, match=r"lora\.b_in"):
        run(p, leaf | {"b_in": leaf["a_in"]})
    for wrong in (-1, 3):
        with pytest.raises(ValueError, match="base_of_slot_B points outside"):
            run(replace(p, base_of_slot_B=torch.tensor([0, 1, wrong])), leaf)


def test_second_derivative_is_refused_not_wrong() -> None:
    p = problem(5, 8, 6, 3, 2)
    leaf = leaves(p)
    (dx,) = torch.autograd.grad(run(p, leaf), leaf["x"], p.dy_TH.clone().requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_shapes_without_data() -> None:
    """On the meta device the operator answers with shapes alone, beyond int32 as well: 2^21 rows of 2^12 values."""
    with torch.device("meta"):
        T, K = 2**18, 8
        index = {n: torch.empty(T * K, dtype=torch.int64) for n in ("tokens_R", "places_R")}
        table = {n: torch.empty(T, K, dtype=torch.int64) for n in ("experts_TK", "slots_TK", "rows_TK")}
        offsets_B1, s_TK = torch.empty(5, dtype=torch.int64), torch.empty(T, K, requires_grad=True)
        routing = Routing(weights_TK=s_TK, **table, **index, offsets_B1=offsets_B1, num_slots=4)
        w_in, w_out = torch.empty(4, 4096, 64, requires_grad=True), torch.empty(4, 64, 2048, requires_grad=True)
        x = torch.empty(T, 64, requires_grad=True)
        moe_mlp(x, routing, w_in, w_out).backward(torch.empty(T, 64))
    assert [t.grad.shape for t in (x, s_TK, w_in, w_out)] == [t.shape for t in (x, s_TK, w_in, w_out)]


def test_expert_weights_refuse_a_frozen_part_that_learns() -> None:
    with pytest.raises(ValueError, match="frozen part requires a gradient"):
        ExpertWeights(torch.zeros(1, 2), torch.zeros(1, 2, requires_grad=True))
    with pytest.raises(ValueError, match="must agree"):
        ExpertWeights(torch.zeros(1, 2), torch.zeros(1, 3))
