"""torch's FLOP counter on the layer, against products counted by hand."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from layer_cases import E, H, I, K, dense, mask
from torch.utils.flop_counter import FlopCounterMode

from fedmoe_core.layer.lora import LayerLora
from fedmoe_core.layer.moe import MoE
from fedmoe_core.layer.state import LayerState

T, RANK = 30, 3
ROUTER, FIRST, SECOND = 2 * T * E * H, 2 * T * K * 2 * I * H, 2 * T * K * H * I
ADAPTER = 2 * T * K * RANK * (H + 2 * I + I + H)


def adapted() -> LayerState:
    weights = dense()
    return replace(LayerState.whole(*weights), lora=LayerLora.fresh(*weights[1:], rank=RANK, scale=1.0, seed=0))


def counted(layer: MoE, *, needs_x: bool, mask_T: torch.Tensor | None = None) -> int:
    x = torch.randn(T, H, dtype=torch.float64, requires_grad=needs_x)
    with FlopCounterMode(display=False) as counter:
        layer(x, mask_T).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("needs_x", [False, True])
def test_a_layer_that_trains_is_three_times_its_forward(needs_x: bool) -> None:
    """The counter saw the router alone, 0.20 MFLOP of 7.68."""
    want = (3 if needs_x else 2) * (ROUTER + FIRST) + 3 * SECOND
    assert counted(MoE.from_dense(*dense(), K), needs_x=needs_x) == want
    assert counted(MoE.from_dense(*dense(), K, recompute=True), needs_x=needs_x) == want + FIRST


def test_frozen_experts_have_no_weight_gradient() -> None:
    router = 2 * ROUTER
    frozen = MoE.from_dense(*dense(), K, trainable=mask())
    assert counted(frozen, needs_x=True) == router + 2 * (FIRST + SECOND)
    third = MoE.from_dense(*dense(), K, permitted=mask(0, 1, 2), trainable=mask(1))
    # A third of the slots trains; the router's gradient is made for all of its rows.
    assert counted(third, needs_x=True) == 3 * ROUTER + 2 * (FIRST + SECOND) + (FIRST + SECOND) // 3


def test_adapters_are_counted_and_their_base_has_no_weight_gradient() -> None:
    layer = MoE.of(adapted(), K)
    assert counted(layer, needs_x=True) == 3 * ROUTER + 2 * (FIRST + SECOND) + 3 * ADAPTER
    half = MoE.of(adapted(), K, trainable=mask(0, 1, 2))
    assert counted(half, needs_x=True) == 3 * ROUTER + 2 * (FIRST + SECOND) + 3 * ADAPTER // 2


def test_padding_counts_as_if_it_were_real() -> None:
    """Shapes do not say which tokens are padding: the count is the most that can be."""
    layer = MoE.from_dense(*dense(), K)
    assert counted(layer, needs_x=True, mask_T=torch.arange(T) < 3) == counted(layer, needs_x=True)


def test_a_counter_that_was_made_before_the_package_knows_it_too() -> None:
    code = """
from torch.utils.flop_counter import FlopCounterMode
import torch
counter = FlopCounterMode(display=False)
from fedmoe_core import MoE
layer = MoE(64, 32, 8, 2)
with counter:
    layer(torch.randn(100, 64)).sum().backward()
print(counter.get_total_flops())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second, router = 2 * 200 * 64 * 64, 2 * 200 * 64 * 32, 2 * 100 * 64 * 8
    assert int(done.stdout) == 2 * first + 3 * second + 2 * router


def test_the_count_without_memory_is_that_with_it() -> None:
    layer, x = MoE.from_dense(*dense(), K), torch.randn(T, H, dtype=torch.float64, device="meta", requires_grad=True)
    layer = layer.to("meta")
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == 3 * (ROUTER + FIRST + SECOND)
