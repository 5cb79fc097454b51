"""Importance sums under loss scaling: in float32, of the loss itself, and finite after a step that overflowed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fedmoe_kernels import ExpertScores, moe_mlp, route

COLUMNS = ("rows", "taylor", "taylor_abs", "fisher", "taylor_in", "grad_sq", "reap")
T, H, I, B = 24, 8, 12, 4  # noqa: E741


@pytest.fixture
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


def step(scores: ExpertScores, scale: float | Tensor, seed: int = 0) -> None:
    """One backward of a loss that is multiplied by ``scale``."""
    draw = torch.Generator().manual_seed(seed)
    x, logits = torch.randn(T, H, generator=draw), torch.randn(T, B, generator=draw)
    w_in, w_out = torch.randn(B, 2 * I, H, generator=draw), torch.randn(B, H, I, generator=draw)
    for leaf in (x, logits, w_in, w_out):
        leaf.requires_grad_()
    (moe_mlp(x, route(logits, 2), w_in, w_out, scores=scores).square().sum() * scale).backward()


@pytest.mark.parametrize("default_dtype", [torch.bfloat16, torch.float16, torch.float64], indirect=True)
def test_sums_are_float32_whatever_the_default(default_dtype: torch.dtype) -> None:
    """In bfloat16 they stalled: 1024 rows where there were 3000."""
    scores = ExpertScores(B)
    scores.set_loss_scale(2.0)
    assert scores.leaf_B7.dtype == scores.rows_B.dtype == scores.unscale_7.dtype == torch.float32
    scores.leaf_B7.grad = torch.zeros_like(scores.leaf_B7)
    for _ in range(100):
        scores.leaf_B7.grad += 30.0
    assert scores.rows_B.tolist() == [3000.0] * B


@pytest.mark.parametrize("as_tensor", [False, True])
def test_sums_are_those_of_the_loss_itself(as_tensor: bool) -> None:
    """They were 65536 times larger, and those of other steps weighted by another scale."""
    plain, scaled = ExpertScores(B), ExpertScores(B)
    for seed, scale in enumerate((65536.0, 2.0**20, 8.0)):
        step(plain, 1.0, seed)
        scaled.set_loss_scale(torch.tensor(scale) if as_tensor else scale)
        step(scaled, scale, seed)
    for name in COLUMNS:
        want = getattr(plain, f"{name}_B")
        assert want.any(), name
        torch.testing.assert_close(getattr(scaled, f"{name}_B"), want, rtol=1e-5, atol=0, msg=name)


def test_a_backward_that_overflows_adds_what_its_loss_cannot_spoil() -> None:
    """The sums stayed NaN after it for good; rows and REAP come from the forward."""
    scores, other = ExpertScores(B), ExpertScores(B)
    for seed, scale in enumerate((float("inf"), 1.0, float("nan"), 1.0)):
        step(scores, scale, seed)
        if scale == 1.0:
            step(other, 1.0, seed)
    for name in COLUMNS[1:-1]:
        assert torch.equal(getattr(scores, f"{name}_B"), getattr(other, f"{name}_B")), name
    assert scores.rows_B.sum() == 2 * other.rows_B.sum() == 4 * T * 2
    forward = ExpertScores(B)
    for seed in range(4):
        step(forward, 1.0, seed)
    assert torch.equal(scores.reap_B, forward.reap_B)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("inf"), float("nan")])
def test_a_scale_that_cannot_be_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match=r"scale is .*; give the positive number that the loss is multiplied by"):
        ExpertScores(B).set_loss_scale(bad)


def test_a_scaler_s_skipped_steps_leave_the_sums_of_the_others() -> None:
    from fedmoe_core import MoE

    torch.manual_seed(0)
    layer = MoE(64, 32, 8, 2, with_scores=True)
    optimizer, scaler = torch.optim.AdamW(layer.parameters()), torch.amp.GradScaler("cpu", init_scale=2.0**40)
    skipped = 0
    for _ in range(30):
        optimizer.zero_grad()
        layer.scores.set_loss_scale(scaler.get_scale())
        with torch.autocast("cpu", torch.float16):
            loss = layer(torch.randn(20, 64)).float().square().mean()
        scaler.scale(loss).backward()
        skipped += not layer.w_in.grad.isfinite().all()
        scaler.step(optimizer)
        scaler.update()
    assert 5 < skipped < 25
    assert layer.scores.leaf_B7.grad.isfinite().all()
    assert 0 < layer.scores.taylor_abs_B.sum() < 1
    layer.set_experts([True] * 4 + [False] * 4)
    assert layer.scores.unscale_7 is not None
