"""An optimizer that goes on when other experts train."""

from __future__ import annotations

import pytest
import torch
from layer_cases import H, K, dense, mask
from torch import nn

from fedmoe_core import following
from fedmoe_core.layer.moe import MoE

X = torch.randn(64, H, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def step(layer: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    layer(X.clone().requires_grad_()).square().mean().backward()
    optimizer.step()


def held_by(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize("kind", [torch.optim.AdamW, lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9)])
def test_rows_that_stay_keep_their_state_and_new_ones_start_from_zero(kind) -> None:
    torch.manual_seed(0)
    layer = MoE.from_dense(*dense(), K, trainable=mask(1, 3, 4))
    model = nn.Sequential(nn.Linear(H, H, dtype=torch.float64), layer)
    optimizer = kind(model.parameters())
    step(model, optimizer)
    key = "exp_avg" if kind is torch.optim.AdamW else "momentum_buffer"
    old = {name: optimizer.state[p][key].clone() for name, p in layer.named_parameters()}
    before = layer.w_in[1].detach().clone()
    with following(optimizer, model):
        layer.set_experts(None, mask(3, 5))
    assert {id(p) for p in held_by(optimizer)} == {id(p) for p in model.parameters()}
    assert len(optimizer.state) == len(list(model.parameters()))
    for name, parameter in layer.named_parameters():
        moved = optimizer.state[parameter][key]
        assert torch.equal(moved[0], old[name][1]), name  # expert 3
        assert old[name][1].any(), name
        assert not moved[1].any(), name  # expert 5
    assert torch.equal(layer.w_in[0], before)
    step(model, optimizer)
    assert not torch.equal(layer.w_in[0], before)


def test_it_follows_a_layer_that_trains_nothing_and_something_again() -> None:
    layer = MoE.from_dense(*dense(), K, trainable=mask(1))
    other = nn.Linear(H, H, dtype=torch.float64)
    optimizer = torch.optim.AdamW([{"params": other.parameters()}, {"params": layer.parameters(), "lr": 0.1}])
    step(layer, optimizer)
    with following(optimizer, layer):
        layer.set_experts(None, mask())
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 0]
    with following(optimizer, layer):
        layer.set_experts(None, mask(2))
    assert {id(p) for p in held_by(optimizer)} == {id(p) for p in [*other.parameters(), *layer.parameters()]}
    before = layer.w_in.detach().clone()
    step(layer, optimizer)
    assert not torch.equal(layer.w_in, before)


def test_without_it_nothing_moves() -> None:
    """What the guide warns of."""
    layer = MoE.from_dense(*dense(), K)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    layer.set_experts(None, mask(0, 1))
    before = layer.w_in.detach().clone()
    step(layer, optimizer)
    assert torch.equal(layer.w_in, before)
