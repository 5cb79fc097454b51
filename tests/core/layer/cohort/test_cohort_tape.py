"""Auxiliary losses in a cohort: each client's value and gradients are those that it has alone, and nobody else's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_cohort_layer import KINDS, C, H, T, clients_of, drawn
from torch import Tensor

from fedmoe_core.algorithms.fft_moe import HeterogeneityLoss
from fedmoe_core.algorithms.lora.rank_tail import TailLoss
from fedmoe_core.layer.cohort.layer import CohortMoE
from fedmoe_core.layer.cohort.tape import recording_cohort
from fedmoe_core.layer.moe import MoE
from fedmoe_core.layer.recording import recording
from fedmoe_core.layer.router_loss import AuxLoss, SwitchBalance

TARGET_LE = np.linspace(1, 2, 6)[None] / np.linspace(1, 2, 6).sum()
LOSSES: dict[str, AuxLoss] = {
    "Switch": SwitchBalance(0.7, served_only=True),
    "Switch over the whole router": SwitchBalance(0.7),
    "FFT-MoE": HeterogeneityLoss(0.3, 0.5, TARGET_LE),
}
TAIL: dict[str, AuxLoss] = {"HetLoRA": TailLoss(0.4, 1, 2)}


def mask_of_all() -> Tensor:
    mask_CT = torch.ones(C, T, dtype=torch.bool)
    mask_CT[0, 3], mask_CT[2, 5:] = False, False
    return mask_CT


def close(found: Tensor, wanted: Tensor, what: str) -> None:
    """The losses themselves are float32."""
    error = (found - wanted).norm() / wanted.norm().clamp(min=1e-6)
    assert error < 3e-6, f"{what}: {error}"


def gradient_alone(layer: MoE, x_TH: Tensor, mask_T: Tensor, loss: AuxLoss) -> tuple[Tensor, Tensor]:
    x_TH = x_TH.clone().requires_grad_()
    with recording(layer) as tape:
        layer(x_TH, mask_T)
        value = loss(tape)
    value.backward()
    return value.detach(), torch.zeros_like(x_TH) if x_TH.grad is None else x_TH.grad


@pytest.mark.parametrize("kind", KINDS)
def test_each_client_has_its_own_loss(kind: str) -> None:
    losses = LOSSES | (TAIL if "adapters" in kind else {})
    for name, loss in losses.items():
        alone, parts = clients_of(kind)
        together = CohortMoE(alone[0], parts)
        x_CTH, mask_CT = drawn(30, C, T, H), mask_of_all()
        x_TH = x_CTH.flatten(0, 1).requires_grad_()
        with recording_cohort([together]) as tape:
            together(x_TH, mask_CT.flatten())
            values = [loss(tape.of(client)) for client in range(C)]
        assert together.recorder is None
        weights = [1.0, -2.0, 3.0]  # a gradient that reached another client would not cancel
        sum(weight * value for weight, value in zip(weights, values, strict=True)).backward()
        for client, layer in enumerate(alone):
            value, dx = gradient_alone(layer, x_CTH[client], mask_CT[client], loss)
            close(values[client].detach(), value, name)
            if x_TH.grad is not None:
                close(x_TH.grad.unflatten(0, (C, T))[client], weights[client] * dx, f"{name}: dx")
            for key, parameter in together.learning.items():
                begin, end = together.bounds(key)[client : client + 2]
                if begin == end:
                    continue
                want = getattr(layer, key).grad
                found = parameter.grad
                if want is None:
                    assert found is None or not found[begin:end].any(), key
                else:
                    assert found is not None
                    close(found[begin:end].view_as(want), weights[client] * want, f"{name}: {key}")


def test_without_a_mask_and_with_one_client_only() -> None:
    alone, parts = clients_of("plain")
    together = CohortMoE(alone[0], parts)
    x_CTH = drawn(30, C, T, H)
    with recording_cohort([together]) as tape:
        together(x_CTH.flatten(0, 1))
        LOSSES["Switch"](tape.of(1)).backward()
        rows_CE = tape.rows_LCE()[0]
        choices_CTK = tape.choices(0)
    gradient_alone(alone[1], x_CTH[1], torch.ones(T, dtype=torch.bool), LOSSES["Switch"])
    begin, end = together.bounds("router")[1:3]
    router = together.learning["router"].grad
    assert router is not None
    assert not router[:begin].any()
    assert not router[end:].any()
    close(router[begin:end], alone[1].router.grad, "router")  # type: ignore[arg-type]
    for client, layer in enumerate(alone):
        with recording(layer) as one:
            layer(x_CTH[client])
            assert torch.equal(choices_CTK[client], one.choices(0))
            np.testing.assert_array_equal(rows_CE[client], one.rows_E(0))
    with pytest.raises(ValueError, match="nothing on the tape"):
        tape.choices(0)


def test_rows_are_counted_for_the_expert_that_serves() -> None:
    alone, parts = clients_of("served by aliases")
    together = CohortMoE(alone[0], parts)
    x_CTH = drawn(30, C, T, H)
    with recording_cohort([together]) as tape:
        together(x_CTH.flatten(0, 1))
        rows_CE = tape.rows_LCE()[0]
    for client, layer in enumerate(alone):
        with recording(layer) as one:
            layer(x_CTH[client])
            np.testing.assert_array_equal(rows_CE[client], one.rows_E(0))
