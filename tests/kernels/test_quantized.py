"""Quantised frozen experts: codes, packing, what is refused, and moe_mlp over them against dequantised weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from expert_cases import FACTORS, Problem, assert_close, leaves, names, problem, solve, truth

from fedmoe_kernels import ExpertLora, ExpertScores, ExpertWeights, Quantized, moe_mlp


def stored(p: Problem, bits: int, frozen_from: int) -> tuple[dict[str, Quantized], Problem]:
    """The frozen slots' matrices in codes, and the problem whose weights are what those codes say."""
    codes = {n: Quantized.of(p.tensors[n][frozen_from:], bits, 32) for n in ("w_in", "w_out")}
    known = {n: torch.cat([p.tensors[n][:frozen_from], q.dequantize(torch.float64)]).detach() for n, q in codes.items()}
    return codes, replace(p, tensors=p.tensors | known)


@pytest.mark.parametrize("shape", [(3, 5, 32), (1, 1, 64), (0, 4, 96), (2, 7, 256)])
@pytest.mark.parametrize("bits", [8, 4])
def test_codes_are_the_nearest(bits: int, shape: tuple[int, int, int]) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    q = Quantized.of(w, bits, 32)
    assert q.shape == w.shape
    assert (q.bits, q.group) == (bits, 32)
    assert q.bytes == w.numel() * bits // 8 + w.numel() // 32 * 4
    step = q.scale.double().repeat_interleave(32, 2)
    assert ((q.dequantize(torch.float64) - w).abs() <= step * 0.5001).all()
    again = Quantized.of(q.dequantize(torch.float64), bits, 32)
    assert torch.equal(again.codes, q.codes)


def test_packing_is_low_nibble_first() -> None:
    w = (torch.arange(32) % 15 - 7).float().view(1, 1, 32)
    q = Quantized.of(w, 4, 32)
    assert torch.equal(q.dequantize(torch.float32), w)
    assert q.codes.dtype == torch.uint8
    assert q.codes[0, 0, 0] == (w[0, 0, 0] + 8) + 16 * (w[0, 0, 1] + 8)


def test_groups_of_zeros_and_of_tiny_numbers() -> None:
    w = torch.zeros(1, 2, 32)
    w[0, 1] = torch.finfo(torch.float32).tiny / 2
    for bits in (8, 4):
        value = Quantized.of(w, bits, 32).dequantize(torch.float32)
        assert value.isfinite().all()
        assert (value[0, 0] == 0).all()


REFUSED = {
    "bits": (lambda: Quantized.of(torch.zeros(1, 2, 32), 3, 32), "bits is 3"),
    "group that is no multiple of 32": (lambda: Quantized.of(torch.zeros(1, 2, 48), 8, 16), "group=16"),
    "group that does not divide": (lambda: Quantized.of(torch.zeros(1, 2, 96), 8, 64), "group=64"),
    "a matrix": (lambda: Quantized.of(torch.zeros(2, 32), 8, 32), "3-D"),
    "infinity": (lambda: Quantized.of(torch.full((1, 2, 32), float("inf")), 8, 32), "finite"),
    "codes of floats": (lambda: Quantized(torch.zeros(1, 2, 32), torch.zeros(1, 2, 1)), "codes"),
    "scale of another shape": (lambda: Quantized(torch.zeros(1, 2, 32).char(), torch.zeros(1, 3, 1)), "scale"),
    "scale in half": (lambda: Quantized(torch.zeros(1, 2, 32).char(), torch.zeros(1, 2, 1).half()), "float32"),
    "no group": (lambda: Quantized(torch.zeros(1, 2, 32).char(), torch.zeros(1, 2, 0)), "scale"),
    "uneven groups": (lambda: Quantized(torch.zeros(1, 2, 64).char(), torch.zeros(1, 2, 3)), "groups"),
    "short groups": (lambda: Quantized(torch.zeros(1, 2, 64).char(), torch.zeros(1, 2, 4)), "32"),
    "other trailing shape": (
        lambda: ExpertWeights(torch.zeros(1, 2, 64), Quantized.of(torch.zeros(1, 2, 32), 8, 32)),
        "must agree",
    ),
}


@pytest.mark.parametrize(("make", "named"), REFUSED.values(), ids=REFUSED.keys())
def test_refuses_by_name(make: object, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make()


def solve_stored(p: Problem, bits: int, frozen_from: int, dtype: torch.dtype, **options: object) -> tuple[dict, dict]:
    """(got, want): y and every gradient with quantised frozen slots, and by the reference on what the codes say."""
    codes, known = stored(p, bits, frozen_from)
    leaf = leaves(known, dtype)
    stacks = {
        n: ExpertWeights(leaf[n][:frozen_from], codes.get(n, leaf[n][frozen_from:].detach()))
        for n in ("w_in", "w_out", "bias_in", "bias_out")
        if n in leaf
    }
    y = moe_mlp(
        *(leaf["x"], p.routing(leaf["s"]), stacks["w_in"], stacks["w_out"]),
        activation=p.activation,
        bias_in=stacks.get("bias_in"),
        bias_out=stacks.get("bias_out"),
        **options,
    )
    y.backward(p.dy_TH.to(dtype))
    want = truth(known)
    for n in stacks:
        want[f"d{n}"][frozen_from:] = 0
    return {"y": y.detach(), **{f"d{n}": leaf[n].grad for n in names(p)}}, want


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("frozen_from", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_inv4_equals_the_reference_on_dequantised_weights(bits: int, frozen_from: int, dtype: torch.dtype) -> None:
    p = problem(29, 64, 32, 5, 2, biases=True, routes="gaps").rounded(dtype)
    got, want = solve_stored(p, bits, frozen_from, dtype)
    assert_close(got, want, {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype])
    if frozen_from:
        by_reference, _ = solve_stored(p, bits, frozen_from, dtype, backend="reference")
        assert_close(by_reference, want, {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype])


def test_importance_counts_quantised_slots() -> None:
    p = problem(29, 64, 32, 4, 2)
    _, known = stored(p, 8, 2)
    scores, plain = ExpertScores(4), ExpertScores(4)
    solve_stored(p, 8, 2, torch.float64, scores=scores)
    solve(known, scores=plain, trainable_B=torch.tensor([True, True, False, False]))
    assert torch.allclose(scores.leaf_B6.grad, plain.leaf_B6.grad)


def test_adapters_over_shared_quantised_bases() -> None:
    """QLoRA of two clients: six slots on three base experts in four bits; only factors get gradients."""
    p = problem(18, 32, 32, 6, 2, rank=2)
    shared = {n: t[:3] if n in ("w_in", "w_out") else t for n, t in p.tensors.items()}
    p = replace(p, tensors=shared, base_of_slot_B=torch.tensor([0, 1, 2, 0, 1, 2]))
    codes, known = stored(p, 4, 0)
    leaf = leaves(known)
    weights = {n: ExpertWeights(leaf[n][:0].detach(), q) for n, q in codes.items()}
    lora = ExpertLora(*(leaf[n] for n in FACTORS), p.lora_scale, p.base_of_slot_B)
    y = moe_mlp(leaf["x"], p.routing(leaf["s"]), weights["w_in"], weights["w_out"], lora=lora)
    y.backward(p.dy_TH)
    assert_close({"y": y.detach(), **{f"d{n}": leaf[n].grad for n in names(p)}}, truth(known), 1e-12)


def test_biases_stay_in_floats_and_devices_agree() -> None:
    p = problem(5, 32, 32, 3, 2, biases=True)
    codes, _ = stored(p, 8, 1)
    t = p.tensors
    w_in, w_out = (ExpertWeights(t[n][:1], codes[n]) for n in ("w_in", "w_out"))
    wide = Quantized.of(torch.zeros(2, 1, 64), 8, 32)
    bias = ExpertWeights(torch.zeros(1, 1, 64, dtype=torch.float64), wide)
    with pytest.raises(ValueError, match="bias_in"):
        moe_mlp(t["x"], p.routing(t["s"]), w_in, w_out, bias_in=bias)
    far = ExpertWeights(t["w_in"][:1], codes["w_in"].to("meta"))
    with pytest.raises(ValueError, match="w_in's frozen part is on meta"):
        moe_mlp(t["x"], p.routing(t["s"]), far, w_out)


def test_autocast_leaves_the_codes_alone() -> None:
    p = problem(29, 64, 32, 4, 2).rounded(torch.bfloat16)
    codes, known = stored(p, 8, 2)
    leaf = {n: t.float() for n, t in known.tensors.items()}
    weights = [ExpertWeights(leaf[n][:2], codes[n]) for n in ("w_in", "w_out")]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = moe_mlp(leaf["x"], p.routing(leaf["s"]), *weights)
    assert y.dtype == torch.bfloat16
    assert_close({"y": y}, {"y": truth(known)["y"]}, 2e-2)
