"""Invariant 10 in whatever order a launch's programs run: the same bits, forward, backward and in routing."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in a process with TRITON_INTERPRET=1", allow_module_level=True)

import program_order
import triton
import triton.language as tl
from expert_cases import leaves, names, problem, run
from forward_cases import normal
from program_order import ORDERS
from route_cases import INDEX_FIELDS, STATS_FIELDS, cohort, draw

from fedmoe_kernels import ExpertScores, Routing, SlotMap, route
from fedmoe_kernels.gpu.experts.schedule import schedule

CASES = {
    "some frozen, with biases": ({"biases": True}, {"frozen_from": 2}),
    "clamped, places without a row": ({"biases": True, "activation": "swiglu_oai", "routes": "gaps"}, {}),
    "top-1": ({"K": 1, "activation": "relu"}, {"recompute": True}),
    "adapters": ({"rank": 4, "routes": "gaps"}, {}),
}


def outcomes(make: Callable[[], dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """What is made in each of the orders, the interpreter's own first."""
    found = []
    for order in ORDERS.values():
        with pytest.MonkeyPatch.context() as patch:
            program_order.install(patch.setattr, order)
            found.append(make())
    return found


def differing(made: list[dict[str, Tensor]]) -> set[str]:
    first, *others = made
    return {name for other in others for name, value in first.items() if not torch.equal(value, other[name])}


@pytest.mark.parametrize("case", CASES)
def test_inv10_both_passes_and_importance(case: str) -> None:
    """24 tokens: several tiles and several blocks of columns in every launch over rows."""
    drawn, options = CASES[case]
    p = problem(**{"T": 24, "H": 20, "I": 20, "B": 3, "K": 2} | drawn)

    def make() -> dict[str, Tensor]:
        leaf, scores = leaves(p, torch.float32), ExpertScores(3)
        y = run(p, leaf, scores=scores, backend="triton", **options)
        y.backward(p.dy_TH.float())
        return {"y": y.detach(), "scores": scores.leaf_B7.grad, **{n: leaf[n].grad for n in names(p)}}

    assert differing(outcomes(make)) == set()


@pytest.mark.parametrize("clients", [1, 3])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_inv10_routing_both_passes_and_statistics(scoring: str, clients: int) -> None:
    T, E, k = 300, 12, 3
    permit, client_T = cohort(clients, E, T)
    logits_TE, upstream_TK = draw(T, E), draw(T, k, seed=1)

    def make() -> dict[str, Tensor]:
        leaf = logits_TE.clone().requires_grad_()
        options = {"scoring": scoring, "with_stats": True, "backend": "triton"}
        routing = route(leaf, k, permitted_E=permit, client_T=client_T, **options)
        routing.weights_TK.backward(upstream_TK)
        rows = {name: getattr(routing, name).detach() for name in (*INDEX_FIELDS, "weights_TK")}
        stats = {name: getattr(routing.stats, name) for name in STATS_FIELDS}
        return rows | stats | {"dlogits": leaf.grad}

    assert differing(outcomes(make)) == set()


def test_inv10_places_and_schedule() -> None:
    p = problem(200, 4, 4, 9, 3, routes="gaps")

    def make() -> dict[str, Tensor]:
        routing = Routing.from_topk(p.slots_TK, p.tensors["s"].float(), SlotMap(torch.arange(9), 9), backend="triton")
        tiles = schedule(routing.offsets_B1, 600, 16)
        rows = {name: getattr(routing, name) for name in INDEX_FIELDS}
        return rows | {"table": tiles.table_M4, "first_tile": tiles.first_tile_B1}

    assert differing(outcomes(make)) == set()


@triton.jit
def _add_kernel(values, out):
    tl.atomic_add(out, tl.load(values + tl.program_id(0) * 2 + tl.program_id(1)))


@triton.jit
def _overwrite_kernel(values, out):
    tl.store(out, tl.load(values + tl.program_id(0) * 2 + tl.program_id(1)))


@triton.jit
def _count_kernel(out):
    at = out + (tl.program_id(0) * 2 + tl.program_id(1)) * 3 + tl.program_id(2)
    tl.store(at, tl.load(at) + 1)


@pytest.mark.parametrize("kernel", [_add_kernel, _overwrite_kernel])
def test_a_kernel_that_depends_on_the_order_is_caught(kernel) -> None:
    values = normal(64, seed=1)  # rounded sums in each order differ, and each ends with another program

    def make() -> dict[str, Tensor]:
        out = torch.zeros(1)
        kernel[(32, 2)](values, out)
        return {"out": out}

    as_numbered, *others = outcomes(make)
    assert all(differing([as_numbered, other]) for other in others), "each order alone catches it"


@pytest.mark.parametrize("order", ORDERS)
def test_every_program_runs_once(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program_order.install(monkeypatch.setattr, ORDERS[order])
    out = torch.zeros(5 * 2 * 3)
    _count_kernel[(5, 2, 3)](out)
    assert (out == 1).all()
    assert sorted(ORDERS[order](30)) == list(range(30))
    assert (list(ORDERS[order](30)) == list(range(30))) == (order == "as numbered")
