"""The whole operator in bfloat16 and float16: the GPU run's own checks, and small ones of what those do at length.

A GPU computes in these types. Tolerances are those that the GPU run has; its sizes are those of its rehearsal.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in a process with TRITON_INTERPRET=1", allow_module_level=True)

import bfloat16_interpreter
from cohort_cases import assert_clients_keep_their_bits
from expert_cases import assert_close, learned, leaves, names, problem, run, sent_back, solve, truth

from bench.gpu.measure import correct
from fedmoe_kernels import ExpertScores, ExpertWeights, Quantized, moe_mlp
from fedmoe_kernels.experts import ops
from fedmoe_kernels.experts.op_inputs import OpInputs
from fedmoe_kernels.formats import FORMATS

HALVES = (torch.bfloat16, torch.float16)
# Of all its checks those in which a rounding is in another place or falls on another shape. Frozen experts as codes and
# clients of a cohort have small cases below, as its own take 30 s each here.
CHECKS = (
    *("a quarter trainable", "swiglu_oai with biases", "no size a multiple of a block", "places without a row"),
    *("empty slots", "importance sums", "adapters over shared bases"),
)


@pytest.fixture(autouse=True)
def _bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter computes in bfloat16, so nothing refuses it; other refusals stand."""
    refusal = ops._refusal

    def admitting(inputs: OpInputs) -> str | None:
        if inputs.x_TH.dtype == torch.bfloat16:
            inputs = inputs._replace(x_TH=inputs.x_TH.new_empty(0, dtype=torch.float16))
        return refusal(inputs)

    bfloat16_interpreter.install(monkeypatch.setattr)
    monkeypatch.setattr(ops, "_refusal", admitting)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", CHECKS)
def test_the_gpu_runs_check(name: str, dtype: torch.dtype) -> None:
    checks = correct.checks("cpu", "triton", tiny=True)
    said = checks[f"{str(dtype).removeprefix('torch.')}: {name}"]()
    worst = float(said.removeprefix("worst relative error ").split()[0])
    # float32 all the way would stay under a millionth: so the type of the check is what was computed in.
    assert worst > 1e-5


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rank", [64, 128])
def test_inv4_adapters_of_a_high_rank(rank: int, dtype: torch.dtype) -> None:
    """More than one product over the rank, the second of them over what the first has rounded."""
    p = problem(11, 24, 20, 3, 2, rank=rank, biases=True, routes="gaps")
    p = replace(p, tensors={n: t / rank**0.5 if n in ("b_in", "b_out") else t for n, t in p.tensors.items()})
    p = p.rounded(dtype)
    assert_close(solve(p, dtype, backend="triton"), truth(p), correct.TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("form", FORMATS)
def test_inv4_frozen_slots_as_codes(form: str, dtype: torch.dtype) -> None:
    """Codes decode to float32 and are rounded before they are multiplied."""
    p, trainable = problem(13, 64, 32, 3, 2, biases=True).rounded(dtype), 1
    codes = {n: Quantized.of(p.tensors[n][trainable:].to(dtype), form) for n in ("w_in", "w_out")}
    told = {n: torch.cat([p.tensors[n][:trainable], q.dequantize(dtype).double()]) for n, q in codes.items()}
    p = replace(p, tensors=p.tensors | told)
    leaf = leaves(p, dtype)
    stacks = {
        n: ExpertWeights(leaf[n][:trainable], codes.get(n, leaf[n][trainable:].detach()))
        for n in ("w_in", "w_out", "bias_in", "bias_out")
    }
    y = moe_mlp(leaf["x"], p.routing(leaf["s"]), **stacks, backend="triton")
    want = learned(truth(p), torch.arange(3) < trainable)
    assert_close(sent_back(p, leaf, y), want, correct.TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", HALVES)
def test_inv10_a_client_gets_its_bits_whoever_shares_the_cohort(dtype: torch.dtype) -> None:
    assert_clients_keep_their_bits(dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("options", [{"biases": True}, {"rank": 2}])
def test_inv10_same_bits_with_z_recomputed(options: dict, dtype: torch.dtype) -> None:
    p = problem(13, 18, 12, 4, 2, **options)

    def outcome(recompute: bool) -> dict[str, Tensor]:
        leaf, scores = leaves(p, dtype), ExpertScores(4)
        y = run(p, leaf, recompute=recompute, scores=scores, backend="triton")
        y.backward(p.dy_TH.to(dtype))
        return {"y": y.detach(), "scores": scores.leaf_B7.grad, **{n: leaf[n].grad for n in names(p)}}

    kept, again = outcome(False), outcome(True)
    assert all(torch.equal(kept[n], again[n]) for n in kept)


def test_the_other_refusals_stand() -> None:
    p = problem(5, 8, 6, 3, 2)
    with pytest.raises(ValueError, match="float64"):
        solve(p, torch.float64, backend="triton")
