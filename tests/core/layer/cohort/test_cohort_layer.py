"""The layers of several clients as one: every value and gradient is what each client alone has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedmoe_core.layer.cohort.layer import CohortMoE
from fedmoe_core.layer.cohort.parts import ClientLayer
from fedmoe_core.layer.lora import LayerLora
from fedmoe_core.layer.moe import MoE
from fedmoe_core.layer.routing_rule import RoutingRule
from fedmoe_core.layer.state import LayerState

C, T, E, H, WIDTH = 3, 7, 6, 32, 32  # clients, tokens of each, experts, and widths that 32 divides
SIGMOID = RoutingRule(scoring="sigmoid", renormalize=True, groups=(3, 2), scale=1.5)
Prepare = Callable[[MoE, int], Mapping[str, Any]]


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain(layer: MoE, client: int) -> dict[str, Any]:
    return {}


def served(layer: MoE, client: int) -> dict[str, Any]:
    """The first expert that is held serves every absent one."""
    held_E = masks(client)[0]
    return {"alias": np.where(held_E, -1, np.flatnonzero(held_E)[0])}


def own_rows(layer: MoE, client: int) -> dict[str, Any]:
    held = int(np.flatnonzero(masks(client)[0])[-1])
    return {"rows": {"w_out": {held: drawn(client, H, WIDTH)}, "router": {5: drawn(90 + client, H)}}}


def factored(layer: MoE, client: int) -> dict[str, Any]:
    layer.start_out_scale(1.5 + client)
    return {}


def no_router(layer: MoE, client: int) -> dict[str, Any]:
    layer.train_router = False
    return {}


def of_nf4(layer: MoE, client: int) -> dict[str, Any]:
    layer.frozen_format = "nf4"
    return {}


def of_one_adapter(layer: MoE, client: int) -> dict[str, Any]:
    """One client's adapters start elsewhere, so its merged experts are its own."""
    held = int(np.flatnonzero(masks(client)[0])[-1])
    return {"rows": {"a_in": {held: drawn(client, 2, H)}}} if client == 1 else {}


# Whether experts carry adapters, what the layer is like, and what is done to it before it is a client's.
KINDS: dict[str, tuple[bool, dict[str, Any], Prepare]] = {
    "plain": (False, {}, plain),
    "served by aliases": (False, {}, served),
    "rows of its own": (False, {}, own_rows),
    "a factor on the output": (False, {}, factored),
    "a frozen router": (False, {}, no_router),
    "sigmoid, groups, every bias": (False, {"rule": SIGMOID}, plain),
    "weights that are shares": (False, {"rule": RoutingRule(renormalize="share", of=3, temperature=8.0)}, plain),
    "adapters": (True, {}, plain),
    "adapters, one client's own": (True, {}, of_one_adapter),
    "adapters over nf4": (True, {}, of_nf4),
    "recomputed": (False, {"recompute": True}, plain),
}


def masks(client: int) -> tuple[np.ndarray, np.ndarray]:
    held_E = np.random.default_rng(client).random(E) < 0.6
    held_E[[client, 5 - client]] = True
    trains_E = held_E & (np.arange(E) % 2 == client % 2)
    return held_E, trains_E if client < 2 else held_E


def a_state(*, adapters: bool, biases: bool) -> LayerState:
    tensors = {"router": drawn(1, E, H), "w_in": drawn(2, E, 2 * WIDTH, H) / 4, "w_out": drawn(3, E, H, WIDTH) / 4}
    if biases:
        shapes = {"bias_in": (E, 2 * WIDTH), "bias_out": (E, H), "router_bias": (E,), "correction_bias": (E,)}
        tensors |= {name: drawn(10 + place, *shape) for place, (name, shape) in enumerate(shapes.items())}
    lora = None
    if adapters:
        factors = {"a_in": (E, 2, H), "b_in": (E, 2 * WIDTH, 2), "a_out": (E, 2, WIDTH), "b_out": (E, H, 2)}
        lora = LayerLora.of({n: drawn(20 + p, *s) for p, (n, s) in enumerate(factors.items())}, 0.5)
    return LayerState.of(tensors, lora=lora)


def clients_of(kind: str) -> tuple[list[MoE], list[ClientLayer]]:
    adapters, options, prepare = KINDS[kind]
    state, alone, parts = a_state(adapters=adapters, biases="bias" in kind), [], []
    for client in range(C):
        layer = MoE.of(state, 2, with_stats=True, with_scores=True, **options)
        more = prepare(layer, client)
        held_E, trains_E = masks(client)
        layer.load_global(state, permitted=held_E, trainable=trains_E, **more)
        alone.append(layer)
        parts.append(ClientLayer.of(layer, shares="rows" not in more))
    return alone, parts


def run(layer: MoE | CohortMoE, x_TH: Tensor, dy_TH: Tensor, mask_T: Tensor) -> tuple[Tensor, Tensor]:
    x_TH = x_TH.clone().requires_grad_()
    y_TH = layer(x_TH, mask_T)
    y_TH.backward(dy_TH)
    assert x_TH.grad is not None
    return y_TH.detach(), x_TH.grad


def close(found: Tensor, wanted: Tensor, what: str) -> None:
    error = (found - wanted).norm() / wanted.norm().clamp(min=1e-9)
    assert error < 1e-12, f"{what}: {error}"


@pytest.mark.parametrize("kind", KINDS)
def test_each_client_has_the_values_and_gradients_that_it_has_alone(kind: str) -> None:
    alone, parts = clients_of(kind)
    together = CohortMoE(alone[0], parts)
    x_CTH, dy_CTH = drawn(30, C, T, H), drawn(31, C, T, H)
    mask_CT = torch.ones(C, T, dtype=torch.bool)
    mask_CT[0, 3], mask_CT[2, 5:] = False, False
    x_CTH[~mask_CT] = torch.nan  # what lies in padding reaches nobody
    y_TH, dx_TH = run(together, x_CTH.flatten(0, 1), dy_CTH.flatten(0, 1), mask_CT.flatten())
    for client, layer in enumerate(alone):
        mine = slice(client * T, (client + 1) * T)
        y, dx = run(layer, x_CTH[client], dy_CTH[client], mask_CT[client])
        close(y_TH[mine], y, "y")
        close(dx_TH[mine], dx, "dx")
        seen = set()
        for name, parameter in together.learning.items():
            begin, end = together.bounds(name)[client : client + 2]
            if begin == end:
                continue
            seen.add(name)
            gradient = getattr(layer, name).grad
            assert parameter.grad is not None
            close(parameter.grad[begin:end].view_as(gradient), gradient, name)
        assert seen == {name for name, p in layer.named_parameters(recurse=False) if p.grad is not None}
        assert layer.scores is not None
        assert layer.scores.leaf_B7.grad is not None
        assert together.scores.leaf_B7.grad is not None
        sums_B6 = together.scores.leaf_B7.grad[together.slots(client)]
        torch.testing.assert_close(sums_B6, layer.scores.leaf_B7.grad, rtol=1e-5, atol=1e-5)  # kept in float32
        for name, value in vars(layer.last_stats).items():
            close(getattr(together.last_stats, name)[client], value, name)


@pytest.mark.parametrize("kind", ["adapters", "adapters, one client's own", "adapters over nf4"])
def test_a_base_expert_that_clients_share_is_stored_once(kind: str) -> None:
    alone, parts = clients_of(kind)
    together = CohortMoE(alone[0], parts)
    sharing = [c for c in range(C) if parts[c].shares]
    wanted = sum(len(parts[c].trainable + parts[c].frozen) for c in range(C) if c not in sharing)
    wanted += len({e for c in sharing for e in parts[c].trainable}) + len({e for c in sharing for e in parts[c].frozen})
    assert len(together.w_in_frozen) == wanted < sum(len(part.trainable + part.frozen) for part in parts)


def test_one_clients_nan_reaches_no_other_client() -> None:
    alone, parts = clients_of("plain")
    x_TH, dy_TH, mask_T = drawn(40, C * T, H), drawn(41, C * T, H), torch.ones(C * T, dtype=torch.bool)
    whole = CohortMoE(alone[0], parts)
    wanted, wanted_dx = run(whole, x_TH, dy_TH, mask_T)
    parts[1].learning["w_in"].fill_(torch.nan)
    ill = CohortMoE(alone[0], parts)
    y_TH, dx_TH = run(ill, x_TH, dy_TH, mask_T)
    others = torch.ones(C * T, dtype=torch.bool)
    others[T : 2 * T] = False
    assert y_TH[T : 2 * T].isnan().any()
    assert torch.equal(y_TH[others], wanted[others])
    assert torch.equal(dx_TH[others], wanted_dx[others])
    for name, parameter in ill.learning.items():
        begin, end = ill.bounds(name)[1:3]
        assert parameter.grad is not None
        kept = torch.cat([parameter.grad[:begin], parameter.grad[end:]])
        other = getattr(whole, name).grad
        assert torch.equal(kept, torch.cat([other[:begin], other[end:]])), name


def test_what_does_not_go_together_is_refused() -> None:
    alone, parts = clients_of("plain")
    together = CohortMoE(alone[0], parts)
    with pytest.raises(ValueError, match="20 tokens of 3 clients; give each client as many"):
        together(drawn(0, 20, H))
    with pytest.raises(ValueError, match=r"21 tokens with a mask of shape \(20,\) of 3 clients"):
        together(drawn(0, 21, H), torch.ones(20, dtype=torch.bool))
    with pytest.raises(ValueError, match="a cohort needs at least one client"):
        CohortMoE(alone[0], [])
    _, others = clients_of("adapters")
    with pytest.raises(ValueError, match="client 1 of the cohort has other tensors than client 0"):
        CohortMoE(alone[0], [parts[0], others[1]])
