"""Layers whose experts' outputs add up: what a client lacks is missing, and nothing is multiplied to make up for it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedmoe_core.layer.moe import MoE
from fedmoe_core.layer.routing_rule import RoutingRule

E, H, WIDTH = 6, 12, 8


def dense(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (E, H), (E, 2 * WIDTH, H), (E, H, WIDTH)
    router_EH, w_in, w_out = (torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes)
    return router_EH, w_in, w_out


def mask(*ids: int) -> Tensor:
    return torch.isin(torch.arange(E), torch.tensor(ids))


def relative(found: Tensor, want: Tensor) -> float:
    return float((found - want).norm() / want.norm())


def test_share_keeps_the_scale_of_outputs_that_add_up():
    """A split model: a layer that runs every expert is their sum, and one that lacks some lacks their outputs alone."""
    router_EH, w_in, w_out = dense(4)
    rule = RoutingRule(renormalize="share", temperature=2.0**20)
    x_TH = torch.randn(7, H, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    outputs_ETH = torch.stack(
        [MoE.from_dense(router_EH, w_in, w_out, 1, permitted=mask(e))(x_TH).detach() for e in range(E)]
    )
    for held in ((0, 1, 2, 3, 4, 5), (1, 3, 4), (2,)):
        layer = MoE.from_dense(router_EH, w_in, E * w_out, E, permitted=mask(*held), rule=rule)
        assert relative(layer(x_TH), outputs_ETH[list(held)].sum(0)) < 1e-5, held
    renormalized = MoE.from_dense(router_EH, w_in, E * w_out, E, permitted=mask(2))
    assert relative(renormalized(x_TH), E * outputs_ETH[2]) < 1e-10  # what share is for: six times too large


def test_share_remembers_the_models_own_top_k():
    layer = MoE.from_dense(*dense(), 3, rule=RoutingRule(renormalize="share"))
    assert layer.rule.of == 3
    layer.top_k, layer.with_stats = 1, True
    shares = []
    layer.recorder = lambda logits_TE, routing, x_TH: shares.append(routing.weights_TK)
    layer(torch.randn(5, H, dtype=torch.float64))
    torch.testing.assert_close(shares[0], torch.full((5, 1), 1 / 3, dtype=torch.float64))
    saved = MoE.from_dense(*dense(), 3, rule=RoutingRule(renormalize="share")).state_dict()
    MoE.from_dense(*dense(1), 3, rule=RoutingRule(renormalize="share", of=3)).load_state_dict(saved)
    with pytest.raises(RuntimeError, match="a layer with rule="):
        MoE.from_dense(*dense(1), 3).load_state_dict(saved)
