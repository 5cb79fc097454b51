"""Gates that clients keep: their rows in a plan, and what training made of them, as private memory of the run."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedmoe_core.layer.slots import OwnRows
from fedmoe_core.messages.plan import ExpertPlan
from fedmoe_core.model.spec import ModelSpec
from fedmoe_core.server.state import ServerState


def own_rows(state: ServerState, spec: ModelSpec, client: int) -> OwnRows:
    """Return the rows of a plan for the gate that the client has kept; before it has one, the server's.

    What a client keeps lies in the server's memory under ``gate/CLIENT``, (L, E, H): the simulation's stand-in for the
    client's own disk. No other client's plan or average reads it.
    """
    keys = spec.keys_of("router")
    routers = [state.params[key] for key in keys]
    gate = state.memory.get(f"gate/{client}", routers)
    return {
        key: dict(enumerate(gate_EH.to(router.device)))
        for key, gate_EH, router in zip(keys, gate, routers, strict=True)
    }


def sent_gate(plan: ExpertPlan) -> Tensor:
    """Return the gate that a plan with ``rows`` for every expert starts from, (L, E, H)."""
    experts = range(plan.permitted_LE.shape[1])
    return torch.stack([torch.stack([rows[expert] for expert in experts]) for rows in plan.extras.rows.values()])


def grown_gate(plan: ExpertPlan, trained: Mapping[str, Tensor], *, deltas: bool = False) -> Tensor:
    """Return the client's gate after its round, (L, E, H): that of the plan, with the rows that learnt replaced.

    Args:
        plan: with ``rows`` for every expert of every router, by layer.
        trained: new rows of the trainable experts by router key, ascending expert id.
        deltas: whether those are changes of the rows.
    """
    gate_LEH = sent_gate(plan)
    for key, gate_EH, trained_E in zip(plan.extras.rows, gate_LEH, plan.trainable_LE, strict=True):
        if trained_E.any():
            places = torch.from_numpy(trained_E)
            gate_EH[places] = gate_EH[places] + trained[key] if deltas else trained[key]
    return gate_LEH
