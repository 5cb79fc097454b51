"""Small models, plans and updates for the tests of checks and sums."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmoe_core.budget.limits import Budget, Cost
from fedmoe_core.messages.plan import ExpertPlan
from fedmoe_core.messages.profile import ClientProfile
from fedmoe_core.messages.update import ClientUpdate
from fedmoe_core.model.spec import ParamSpec
from fedmoe_core.server.accumulator import Accumulator
from fedmoe_core.server.fixed_point import SumSettings

LAYERS, EXPERTS, HIDDEN, INNER = 2, 5, 3, 4  # four different sizes, so that a swapped axis cannot pass
SHAPE_LE = (LAYERS, EXPERTS)
ALL = np.ones(SHAPE_LE, dtype=bool)
Client = tuple[ClientUpdate, ExpertPlan]


def make_specs(dtype: torch.dtype = torch.float32) -> list[ParamSpec]:
    specs = []
    for layer in range(LAYERS):
        specs += [
            ParamSpec(f"moe.{layer}.router", "router", (EXPERTS, HIDDEN), dtype, layer),
            ParamSpec(f"moe.{layer}.w_in", "expert", (EXPERTS, 2 * INNER, HIDDEN), dtype, layer),
            ParamSpec(f"moe.{layer}.w_out", "expert", (EXPERTS, HIDDEN, INNER), dtype, layer),
        ]
    # A scalar, a vector and a matrix: dense tensors come in every number of dimensions.
    specs += [ParamSpec(f"dense.{n}", "dense", s, dtype) for n, s in (("scale", ()), ("norm", (3,)), ("head", (7, 3)))]
    return specs


def make_state(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {s.key: torch.randn(s.shape, generator=generator).to(dtype) for s in make_specs(dtype)}


def make_plan(trainable_LE: np.ndarray, *, client: int = 0, round_: int = 0) -> ExpertPlan:
    everything = np.ones(trainable_LE.shape, dtype=bool)
    return ExpertPlan(client, round_, everything, trainable_LE, 2, 1, 0, Budget(), Cost())


def make_profile(held_LE: np.ndarray) -> ClientProfile:
    table, row = np.ones(held_LE.shape), np.full(held_LE.shape[0], 8.0)  # 8 tokens
    return ClientProfile(row, table, table, table, -table, row, *[table] * 6, held_LE)


def make_update(
    plan: ExpertPlan,
    seed: int = 0,
    *,
    train_dense: bool = False,
    size: float = 0.1,
    dtype: torch.dtype = torch.float32,
    **fields: Any,
) -> ClientUpdate:
    """A good update for ``plan``: random deltas in (-size, size), random weights in [0, 1] where trained."""
    rng = np.random.default_rng([seed, plan.client])
    deltas = {}
    for spec in make_specs(dtype):
        if spec.kind == "dense":
            shape = spec.shape if train_dense else None
        else:
            rows = int(plan.trainable_LE[spec.layer].sum())
            shape = (rows, *spec.shape[1:]) if rows else None
        if shape is not None:
            deltas[spec.key] = torch.from_numpy(np.asarray(rng.uniform(-size, size, shape))).to(dtype)
    update = ClientUpdate(
        client=plan.client,
        round=plan.round,
        plan_id=plan.id,
        deltas=deltas,
        expert_weight_LE=rng.uniform(0, 1, SHAPE_LE) * plan.trainable_LE,
        router_weight_LE=rng.uniform(0, 1, SHAPE_LE) * plan.trainable_LE,
        gate_weight=float(rng.uniform(0, 1)) if plan.trainable_LE.any() else 0.0,
        sample_weight=float(rng.uniform(0.01, 1)),
        profile=make_profile(plan.permitted_LE),
        cost=Cost(),
        samples=10,
        steps=1,
    )
    return replace(update, **fields)


def some_experts(seed: int, share: float = 0.5) -> np.ndarray:
    """A random trainable mask; some layers may train nothing."""
    return np.random.default_rng(seed).random(SHAPE_LE) < share


def clone_update(update: ClientUpdate) -> ClientUpdate:
    return replace(
        update,
        deltas={key: value.clone() for key, value in update.deltas.items()},
        expert_weight_LE=update.expert_weight_LE.copy(),
        router_weight_LE=update.router_weight_LE.copy(),
    )


def make_clients(count: int, seed: int = 0, *, full: bool = False, train_dense: bool = True) -> list[Client]:
    plans = [make_plan(ALL if full else some_experts(seed * 100 + c), client=c) for c in range(count)]
    return [(make_update(plan, seed, train_dense=train_dense), plan) for plan in plans]


def accumulate(clients: list[Client], format_: SumSettings | None = None) -> Accumulator:
    accumulator = Accumulator(make_specs(), format_, train_dense=True)
    for update, plan in clients:
        outcome = accumulator.add(update, plan)
        assert outcome.accepted, outcome.reason
    return accumulator


def quantized(weight: float, bits: int = 12) -> float:
    """The weight that the sums really use, as a real number."""
    top = 2**bits - 1
    return 0.0 if weight == 0 else max(1, round(weight * top)) / top
