"""From a plan to the client's sub-model in the live model: what it becomes, what it started from, what was sent."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fedmoe_core.adapter import ModelAdapter
from fedmoe_core.memory import tensor_bytes
from fedmoe_core.plan import ExpertPlan


def configure_for(adapter: ModelAdapter, params: Mapping[str, Tensor], plan: ExpertPlan, *, train_dense: bool) -> None:
    """Make the live model the sub-model of ``plan``; nothing of an earlier client stays."""
    adapter.configure(
        params,
        permitted_LE=plan.permitted_LE,
        trainable_LE=plan.trainable_LE,
        rows=plan.rows,
        alias_LE=plan.alias_LE,
        top_k=plan.top_k,
        train_dense=train_dense,
    )


def kind_of(key: str) -> str:
    """The kind of a tensor by its key: "router", "expert" or "dense"."""
    return "dense" if not key.startswith("moe.") else "router" if key.endswith(".router") else "expert"


def start_of(params: Mapping[str, Tensor], key: str, plan: ExpertPlan) -> Tensor:
    """What the client's tensor ``key`` was before training: the rows that the plan trains, ascending expert id.

    Rows of the client's own come before the global ones; dense tensors are whole.
    """
    old = params[key]
    if not key.startswith("moe."):
        return old
    experts = np.flatnonzero(plan.trainable_LE[int(key.split(".")[1])])
    start = old[torch.from_numpy(experts)]
    for place, expert in enumerate(experts):
        if (row := plan.rows.get(key, {}).get(int(expert))) is not None:
            start[place] = row
    return start


def received_bytes(adapter: ModelAdapter, plan: ExpertPlan) -> int:
    """Bytes of the tensors that a client of this configuration is sent: experts, whole routers, and trunk where due."""
    own = {id(t) for layer in adapter.moe if "router" in plan.keeps for t in (layer.router, layer.router_rest)}
    experts = [t for layer in adapter.moe for t in (*layer.parameters(), *layer.buffers())]
    of_experts = {id(t) for t in experts}
    trunk = [p for p in adapter.model.parameters() if id(p) not in of_experts]
    sent = [p for p in trunk if plan.first_participation or p.requires_grad]
    return tensor_bytes(t for t in experts if id(t) not in own) + tensor_bytes(sent)
