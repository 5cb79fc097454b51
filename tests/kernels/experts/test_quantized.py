"""Quantised frozen experts: codes, packing, what is refused, and moe_mlp over them against dequantised weights."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from expert_cases import FACTORS, Problem, assert_close, learned, leaves, problem, sent_back, solve, truth

from fedmoe_kernels import ExpertLora, ExpertScores, ExpertWeights, Quantized, moe_mlp
from fedmoe_kernels.formats import FORMATS, NF4


def stored(p: Problem, form: str, frozen_from: int) -> tuple[dict[str, Quantized], Problem]:
    """The frozen slots' matrices in codes, and the problem whose weights are what those codes say."""
    codes = {n: Quantized.of(p.tensors[n][frozen_from:], form) for n in ("w_in", "w_out")}
    known = {n: torch.cat([p.tensors[n][:frozen_from], q.dequantize(torch.float64)]).detach() for n, q in codes.items()}
    return codes, replace(p, tensors=p.tensors | known)


def numbers(form: str) -> list[float]:
    """What the codes of a format stand for, by definition: bit by bit, or as published."""
    if form == "int8":
        return [float(code) for code in range(-127, 128)]
    if form == "int4":
        return [float(code) for code in range(-7, 8)]
    if form == "nf4":
        return list(NF4)
    exponents, mantissas, bias = (16, 8, 7) if form == "fp8_e4m3" else (4, 2, 1)
    found = []
    for exponent, mantissa in itertools.product(range(exponents), range(mantissas)):
        fraction = mantissa / mantissas
        small = exponent == 0
        found.append((fraction if small else 1 + fraction) * 2.0 ** (max(exponent, 1) - bias))
    if form == "fp8_e4m3":
        found.pop()  # all bits set is NaN
    return sorted({*found, *(-value for value in found)})


def factor_of(q: Quantized) -> torch.Tensor:
    """The factor of every weight, in float64."""
    rows, columns = q.block
    factor = q.scale.double().repeat_interleave(rows, 1).repeat_interleave(columns, 2)
    return factor if q.whole is None else factor * q.whole.double()[:, None, None]


@pytest.mark.parametrize("shape", [(3, 5, 32), (1, 1, 64), (0, 4, 96), (2, 7, 256), (1, 256, 128)])
@pytest.mark.parametrize("form", FORMATS)
def test_codes_are_the_nearest(form: str, shape: tuple[int, int, int]) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    q = Quantized.of(w, form)
    assert q.shape == w.shape
    X, N, K = shape
    assert q.bytes == X * FORMATS[form].bytes_of(N, K)
    levels, factor = torch.tensor(numbers(form), dtype=torch.float64), factor_of(q)
    scaled = w / factor
    got = q.dequantize(torch.float64) / factor
    assert torch.isin(got.float(), levels.float()).all()  # by a scale of 53 bits and back loses the last ones
    best = (scaled[..., None] - levels).abs().amin(-1) if X else scaled
    assert ((got - scaled).abs() <= best + 1e-6 * scaled.abs()).all()
    again = Quantized.of(q.dequantize(torch.float64), form)
    assert torch.equal(again.codes.view(torch.uint8), q.codes.view(torch.uint8))


@pytest.mark.parametrize("form", FORMATS)
def test_the_largest_weight_of_a_block_uses_the_codes_whole_range(form: str) -> None:
    w = torch.randn(2, 128, 128, generator=torch.Generator().manual_seed(1)).double()
    scaled = Quantized.of(w, form).dequantize(torch.float64) / factor_of(Quantized.of(w, form))
    rows, columns = Quantized.of(w, form).block
    largest = scaled.abs().unflatten(2, (-1, columns)).unflatten(1, (-1, rows)).amax((2, 4))
    # mxfp4's scale is the power of two below, so that its largest code is 4 or 6; nvfp4's is rounded to three bits.
    assert (largest >= {"mxfp4": 4, "nvfp4": 4}.get(form, FORMATS[form].largest) - 1e-6).all()


def test_every_code_decodes_to_its_number() -> None:
    """Every byte of fp8 as torch reads it; every code of 4 bits by its definition."""
    byte = torch.arange(256, dtype=torch.uint8).view(1, 2, 128)
    ones = torch.ones(1, 1, 1)
    codes = byte.view(torch.float8_e4m3fn)
    value = Quantized(codes, ones, "fp8_e4m3").dequantize(torch.float32)
    assert torch.equal(value.nan_to_num(-1), codes.float().nan_to_num(-1))
    two = torch.arange(16, dtype=torch.uint8).repeat(2).view(1, 1, 32)
    packed = two[..., ::2] | (two[..., 1::2] << 4)
    eight = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    small = torch.tensor(eight + [-value for value in eight]).repeat(2)
    scale = torch.tensor([[[2.0**-3]]]).to(torch.float8_e8m0fnu)
    assert torch.equal(Quantized(packed, scale, "mxfp4").dequantize(torch.float32).flatten(), small / 8)
    scale = torch.tensor([[[0.5, 448.0]]]).to(torch.float8_e4m3fn)
    by_block = torch.tensor([0.5, 448.0]).repeat_interleave(16) * 0.25
    got = Quantized(packed, scale, "nvfp4", torch.tensor([0.25])).dequantize(torch.float32)
    assert torch.equal(got.flatten(), small * by_block)
    got = Quantized(packed, torch.full((1, 1, 1), 3.0), "nf4").dequantize(torch.float32)
    assert torch.equal(got.flatten(), torch.tensor(NF4).repeat(2) * 3)


def test_gpt_oss_blocks_are_read_as_they_lie() -> None:
    """(E, rows, groups, 16) blocks and (E, rows, groups) biased exponents; the low four bits come first."""
    blocks = torch.randint(256, (2, 3, 4, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    exponents = torch.randint(120, 135, (2, 3, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    eight = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    table = torch.tensor(eight + [-value for value in eight])
    want = torch.empty(2, 3, 4, 32)
    want[..., 0::2], want[..., 1::2] = table[(blocks & 15).long()], table[(blocks >> 4).long()]
    want = torch.ldexp(want, (exponents.int() - 127)[..., None]).flatten(2)
    q = Quantized(blocks.flatten(2), exponents.view(torch.float8_e8m0fnu), "mxfp4")
    assert torch.equal(q.dequantize(torch.float32), want)


def test_a_scale_of_rows_and_columns_covers_its_block() -> None:
    codes = torch.ones(1, 256, 384).to(torch.float8_e4m3fn)
    scale = torch.arange(6.0).view(1, 2, 3) + 1
    value = Quantized(codes, scale, "fp8_e4m3").dequantize(torch.float32)[0]
    assert all((value[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)] == 3 * i + j + 1).all()
               for i in range(2) for j in range(3))  # fmt: skip


def test_packing_is_low_nibble_first() -> None:
    w = (torch.arange(32) % 15 - 7).float().view(1, 1, 32)
    q = Quantized.of(w, "int4")
    assert torch.equal(q.dequantize(torch.float32), w)
    assert q.codes.dtype == torch.uint8
    assert q.codes[0, 0, 0] == (w[0, 0, 0] + 8) + 16 * (w[0, 0, 1] + 8)


@pytest.mark.parametrize("form", FORMATS)
def test_blocks_of_zeros_and_of_tiny_and_of_huge_numbers(form: str) -> None:
    w = torch.zeros(3, 2, 32)
    w[1] = torch.finfo(torch.float32).tiny / 2
    w[2] = torch.finfo(torch.bfloat16).max / 8
    value = Quantized.of(w, form).dequantize(torch.float32)
    assert value.isfinite().all()
    assert (value[0] == 0).all()
    assert (value[1].abs() < 1e-36).all()
    assert torch.allclose(value[2], w[2], rtol=0.3)


REFUSED = {
    "an unknown format": (lambda: Quantized.of(torch.zeros(1, 2, 32), "int3"), "format 'int3' does not exist"),
    "groups of 16 columns": (
        lambda: Quantized.of(torch.zeros(1, 2, 48), "int8", (1, 16)),
        "multiples of 32",
    ),
    "group that does not divide": (lambda: Quantized.of(torch.zeros(1, 2, 96), "int8", (1, 64)), "do not divide"),
    "rows that do not divide": (lambda: Quantized.of(torch.zeros(1, 3, 96), "int8", (2, 32)), "do not divide"),
    "no block that fits": (lambda: Quantized.of(torch.zeros(1, 3, 48), "mxfp4"), "32 divides, not 48"),
    "a matrix": (lambda: Quantized.of(torch.zeros(2, 32), "int8"), "3-D"),
    "infinity": (lambda: Quantized.of(torch.full((1, 2, 32), float("inf")), "nf4"), "finite"),
    "codes of floats": (lambda: Quantized(torch.zeros(1, 2, 32), torch.zeros(1, 2, 1), "int8"), "codes"),
    "codes of another format": (lambda: Quantized(torch.zeros(1, 2, 32).char(), torch.zeros(1, 2, 1), "nf4"), "codes"),
    "scale of another shape": (lambda: Quantized(torch.zeros(1, 2, 32).char(), torch.zeros(1, 3, 1), "int8"), "scale"),
    "scale in half": (lambda: Quantized(torch.zeros(1, 2, 32).char(), torch.zeros(1, 2, 1).half(), "int8"), "float32"),
    "no group": (lambda: Quantized(torch.zeros(1, 2, 32).char(), torch.zeros(1, 2, 0), "int8"), "scale"),
    "uneven groups": (lambda: Quantized(torch.zeros(1, 2, 64).char(), torch.zeros(1, 2, 3), "int8"), "divide"),
    "short groups": (lambda: Quantized(torch.zeros(1, 2, 64).char(), torch.zeros(1, 2, 4), "int8"), "32"),
    "a scale of bytes": (
        lambda: Quantized(torch.zeros(1, 2, 16).byte(), torch.zeros(1, 2, 1).byte(), "mxfp4"),
        "float8_e8m0fnu",
    ),
    "no scale of matrices": (
        lambda: Quantized(torch.zeros(1, 2, 16).byte(), torch.zeros(1, 2, 2).to(torch.float8_e4m3fn), "nvfp4"),
        "nvfp4 needs a scale of whole matrices",
    ),
    "a scale of matrices too many": (
        lambda: Quantized(torch.zeros(1, 2, 32).char(), torch.zeros(1, 2, 1), "int8", torch.ones(1)),
        "int8 has no scale of whole matrices",
    ),
    "a scale of other matrices": (
        lambda: Quantized(
            torch.zeros(1, 2, 16).byte(), torch.zeros(1, 2, 2).to(torch.float8_e4m3fn), "nvfp4", torch.ones(2)
        ),
        "whole",
    ),
    "other trailing shape": (
        lambda: ExpertWeights(torch.zeros(1, 2, 64), Quantized.of(torch.zeros(1, 2, 32), "int8")),
        "must agree",
    ),
}


@pytest.mark.parametrize(("make", "named"), REFUSED.values(), ids=REFUSED.keys())
def test_refuses_by_name(make: object, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make()


def test_both_matrices_in_one_format() -> None:
    p = problem(5, 32, 32, 3, 2)
    t = p.tensors
    w_in = ExpertWeights(t["w_in"][:1], Quantized.of(t["w_in"][1:], "int8"))
    w_out = ExpertWeights(t["w_out"][:1], Quantized.of(t["w_out"][1:], "mxfp4"))
    with pytest.raises(ValueError, match="w_in is stored as int8, w_out as mxfp4"):
        moe_mlp(t["x"], p.routing(t["s"]), w_in, w_out)
    y = moe_mlp(t["x"], p.routing(t["s"]), w_in, ExpertWeights(t["w_out"][:1], t["w_out"][1:].detach()))
    assert y.isfinite().all()


def solve_stored(p: Problem, form: str, frozen_from: int, dtype: torch.dtype, **options: object) -> tuple[dict, dict]:
    """(got, want): y and every gradient with quantised frozen slots, and by the reference on what the codes say."""
    codes, known = stored(p, form, frozen_from)
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
    return sent_back(p, leaf, y), learned(truth(known), torch.arange(p.B) < frozen_from)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("frozen_from", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_inv4_equals_the_reference_on_dequantized_weights(form: str, frozen_from: int, dtype: torch.dtype) -> None:
    p = problem(29, 64, 32, 5, 2, biases=True, routes="gaps").rounded(dtype)
    got, want = solve_stored(p, form, frozen_from, dtype)
    assert_close(got, want, {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype])
    if frozen_from:
        by_reference, _ = solve_stored(p, form, frozen_from, dtype, backend="reference")
        assert_close(by_reference, want, {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype])


def test_importance_counts_quantized_slots() -> None:
    p = problem(29, 64, 32, 4, 2)
    _, known = stored(p, "int8", 2)
    scores, plain = ExpertScores(4), ExpertScores(4)
    solve_stored(p, "int8", 2, torch.float64, scores=scores)
    solve(known, scores=plain, trainable_B=torch.tensor([True, True, False, False]))
    assert torch.allclose(scores.leaf_B7.grad, plain.leaf_B7.grad)


def test_adapters_over_shared_quantized_bases() -> None:
    """QLoRA of two clients: six slots on three base experts in nf4; only factors get gradients."""
    p = problem(18, 32, 32, 6, 2, rank=2)
    shared = {n: t[:3] if n in ("w_in", "w_out") else t for n, t in p.tensors.items()}
    p = replace(p, tensors=shared, base_of_slot_B=torch.tensor([0, 1, 2, 0, 1, 2]))
    codes, known = stored(p, "nf4", 0)
    leaf = leaves(known)
    weights = {n: ExpertWeights(leaf[n][:0].detach(), q) for n, q in codes.items()}
    lora = ExpertLora(*(leaf[n] for n in FACTORS), p.lora_scale, p.base_of_slot_B)
    y = moe_mlp(leaf["x"], p.routing(leaf["s"]), weights["w_in"], weights["w_out"], lora=lora)
    assert_close(sent_back(p, leaf, y), truth(known), 1e-12)


def test_biases_stay_in_floats_and_devices_agree() -> None:
    p = problem(5, 32, 32, 3, 2, biases=True)
    codes, _ = stored(p, "int8", 1)
    t = p.tensors
    w_in, w_out = (ExpertWeights(t[n][:1], codes[n]) for n in ("w_in", "w_out"))
    wide = Quantized.of(torch.zeros(2, 1, 64), "int8")
    bias = ExpertWeights(torch.zeros(1, 1, 64, dtype=torch.float64), wide)
    with pytest.raises(ValueError, match="bias_in"):
        moe_mlp(t["x"], p.routing(t["s"]), w_in, w_out, bias_in=bias)
    far = ExpertWeights(t["w_in"][:1], codes["w_in"].to("meta"))
    with pytest.raises(ValueError, match="w_in's frozen part is on meta"):
        moe_mlp(t["x"], p.routing(t["s"]), far, w_out)


def test_autocast_leaves_the_codes_alone() -> None:
    p = problem(29, 64, 32, 4, 2).rounded(torch.bfloat16)
    codes, known = stored(p, "int8", 2)
    leaf = {n: t.float() for n, t in known.tensors.items()}
    weights = [ExpertWeights(leaf[n][:2], codes[n]) for n in ("w_in", "w_out")]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = moe_mlp(leaf["x"], p.routing(leaf["s"]), *weights)
    assert y.dtype == torch.bfloat16
    assert_close({"y": y}, {"y": truth(known)["y"]}, 2e-2)
