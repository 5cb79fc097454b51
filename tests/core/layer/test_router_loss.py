"""Auxiliary router losses: the Switch loss by hand, whole and on the sub-model, and what a local step makes of one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from one_layer import H, OneLayer, made
from torch import Tensor

from fedmoe_core.client.step import Stepper
from fedmoe_core.config.run_config import TrainConfig
from fedmoe_core.layer.recording import recording
from fedmoe_core.layer.router_loss import SwitchBalance, balance_loss


def by_hand(logits: Tensor, top_k: int) -> float:
    """E * sum_e f_e P_e, one token at a time."""
    experts = logits.shape[1]
    f, p = np.zeros(experts), np.zeros(experts)
    for row in logits.detach().numpy():
        odds = np.exp(row - row.max())
        p += odds / odds.sum() / len(logits)
        for e in np.argsort(-row, kind="stable")[:top_k]:
            f[e] += 1 / (len(logits) * top_k)
    return float(experts * (f * p).sum())


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_switch_loss_by_hand(top_k: int) -> None:
    layers = [made(top_k=top_k), made(top_k=top_k)]
    x = torch.randn(9, H, dtype=torch.float64)
    want = [by_hand(x @ layer.router_EH().T, top_k) for layer in layers]
    with recording(layers) as tape:
        for layer in layers:
            layer(x)
        assert balance_loss(tape).item() == pytest.approx(np.mean(want), rel=1e-6)


def test_on_the_sub_model_absent_experts_do_not_exist() -> None:
    layer = made(0, 2, 3)
    x = torch.randn(9, H, dtype=torch.float64)
    want = by_hand((x @ layer.router_EH().T)[:, [0, 2, 3]], 2)
    with recording(layer) as tape:
        layer(x)
        loss = SwitchBalance(0.5, served_only=True)(tape)
    assert loss.item() == pytest.approx(0.5 * want, rel=1e-6)
    loss.backward()
    assert layer.router.grad is not None
    assert bool(layer.router.grad.isfinite().all())


@pytest.mark.parametrize("weight", [0.0, 3.0])
def test_a_local_step_descends_on_the_sum_and_reports_the_task(weight: float) -> None:
    x = torch.randn(9, H, dtype=torch.float64)
    plain = OneLayer()
    with recording(plain.model) as tape:
        loss = plain.loss(x)
        (loss + weight * balance_loss(tape)).backward()
    want = [p.detach() - 0.1 * p.grad for p in plain.model.parameters()]
    stepped = OneLayer()
    optimizer = torch.optim.SGD(stepped.model.parameters(), lr=0.1)
    stepper = Stepper(stepped, optimizer, TrainConfig(clip=1e9), aux=SwitchBalance(weight))  # type: ignore[arg-type]
    assert stepper.step(x) == loss.item()  # type: ignore[arg-type]
    for found, wanted in zip(stepped.model.parameters(), want, strict=True):
        torch.testing.assert_close(found.detach(), wanted, rtol=1e-12, atol=1e-12)
    assert stepped.moe[0].recorder is None
