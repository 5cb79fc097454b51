"""What passes between server and client, in tensors and bytes: starts, what was sent, what returns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedmoe_core.base.tensor_key import DENSE, TensorKey
from fedmoe_core.budget.peak_memory import tensor_bytes
from fedmoe_core.layer.lora import FACTORS, first_ranks
from fedmoe_core.layer.state import STEERING
from fedmoe_core.messages.plan import ExpertPlan
from fedmoe_core.model.adapter import ModelAdapter


def kind_of(key: str) -> str:
    """Return a tensor's kind by its key: "router", "expert" (factors of adapters too), "scale" or "dense"."""
    place = TensorKey.parse(key)
    if place.layer == DENSE:
        return "dense"
    return "router" if place.name in STEERING else "scale" if place.name == "out_scale" else "expert"


def start_of(params: Mapping[str, Tensor], key: str, plan: ExpertPlan) -> Tensor:
    """Return the client's tensor ``key`` before training: the rows that the plan trains, ascending expert id.

    Rows of the client's own come before the global ones; factors have the client's ranks; dense tensors are whole.
    """
    old, place = params[key], TensorKey.parse(key)
    if place.layer == DENSE:
        return old
    experts = np.flatnonzero(plan.trainable_LE[place.layer])
    start = old[torch.from_numpy(experts)]
    if place.name in FACTORS and plan.extras.lora_rank is not None:
        start = first_ranks(place.name, start, plan.extras.lora_rank).clone()
    for slot, expert in enumerate(experts):
        if (row := plan.extras.rows.get(key, {}).get(int(expert))) is not None:
            start[slot] = row
    return start


class Returned(NamedTuple):
    """What training changed, sorted by where it goes.

    Attributes:
        deltas: new minus old of what the server averages.
        kept: trained rows that stay, or that only this client knows the start of.
        whole: of ``kept`` those that are sent whole: adapters that the state does not have.
    """

    deltas: dict[str, Tensor]
    kept: dict[str, Tensor]
    whole: list[Tensor]


def read_off(trained: Mapping[str, Tensor], params: Mapping[str, Tensor], plan: ExpertPlan) -> Returned:
    """Read what training changed: ``trained`` as ``ModelAdapter.trained``, against what the client was sent."""
    staying = plan.extras.keeps | {"scale"}
    unknown = {key for key in trained if key not in params}
    kept = {key: new.clone() for key, new in trained.items() if key in unknown or kind_of(key) in staying}
    whole = [kept[key] for key in unknown if kind_of(key) not in staying]
    deltas = {key: new - start_of(params, key, plan) for key, new in trained.items() if key not in kept}
    return Returned(deltas, kept, whole)


def returned_bytes(deltas: Mapping[str, Tensor], trained_LE: np.ndarray, plan: ExpertPlan) -> int:
    """Count bytes of the deltas that are sent back: of experts and routers the rows that learnt in this round."""
    total = 0
    for key, delta in deltas.items():
        layer = TensorKey.parse(key).layer
        if layer == DENSE:
            total += delta.nbytes
            continue
        rows_E = plan.trainable_LE[layer]
        learnt = int((trained_LE[layer] & rows_E).sum())
        total += delta.nbytes * learnt // max(int(rows_E.sum()), 1)
    return total


def received_bytes(adapter: ModelAdapter, plan: ExpertPlan) -> int:
    """Count bytes of the tensors that a client of this configuration is sent: experts, whole routers, trunk if due."""
    own = {id(layer.out_scale) for layer in adapter.moe}
    if "router" in plan.extras.keeps:
        steering = (*STEERING, *(f"{name}_rest" for name in STEERING))
        own |= {id(getattr(layer, name)) for layer in adapter.moe for name in steering}
    experts = [t for layer in adapter.moe for t in layer.own_tensors() if t is not layer.correction_bias]
    of_experts = {id(t) for t in experts}
    trunk: list[Tensor] = [p for p in adapter.model.parameters() if id(p) not in of_experts]
    trunk += [layer.correction_bias for layer in adapter.moe if layer.correction_bias is not None]
    sent = [p for p in trunk if plan.first_participation or p.requires_grad]
    adapted = sum(_adapter_bytes(adapter, plan, number) for number in range(len(adapter.moe)))
    return tensor_bytes(t for t in experts if id(t) not in own) + tensor_bytes(sent) + adapted


def _adapter_bytes(adapter: ModelAdapter, plan: ExpertPlan, number: int) -> int:
    """Count what a layer with adapters is sent in addition to what it stores.

    Fresh adapters are made by the client; those of frozen experts travel too, also where the client merges them (else
    they are among what it stores); base experts that it still has do not travel again.
    """
    layer = adapter.moe[number]
    if layer.lora_scale is None:
        return 0
    factors: list[Tensor] = [getattr(layer, name) for name in FACTORS]
    if not plan.extras.sends_adapters(in_state=str(TensorKey(number, "a_in")) in adapter.spec.keys):
        beside = -tensor_bytes(factors)
    else:
        merged = 0 if layer.a_in_frozen is not None else len(layer.frozen_experts)
        beside = merged * sum(math.prod(f.shape[1:]) * f.itemsize for f in factors)
    if plan.extras.cached_LE is None:
        return beside
    stored = tensor_bytes(layer.frozen_tensors())
    held = int((plan.permitted_LE[number] & plan.extras.cached_LE[number]).sum())
    return beside - held * stored // len(layer.experts)
