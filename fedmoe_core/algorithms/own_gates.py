"""Gates that clients keep: their rows in a plan, and what training made of them, as private memory of the run.

A gate is (L, E, H), the routers of all layers; where routers have a bias, (L, E, H + 1) with the bias last.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedmoe_core.base.tensor_key import TensorKey, of_layer, to_keys
from fedmoe_core.layer.slots import OwnRows
from fedmoe_core.layer.state import STEERING
from fedmoe_core.messages.plan import ExpertPlan
from fedmoe_core.model.spec import ModelSpec
from fedmoe_core.server.state import ServerState


def own_rows(state: ServerState, spec: ModelSpec, client: int) -> OwnRows:
    """Return the rows of a plan for the gate that the client has kept; before it has one, the server's.

    What a client keeps lies in the server's memory under ``gate/CLIENT``: the simulation's stand-in for the client's
    own disk. No other client's plan or average reads it.
    """
    kept = state.memory.get(f"gate/{client}")
    rows: dict[str, Mapping[int, Tensor]] = {}
    for layer in range(spec.num_layers):
        keys = {name: str(TensorKey(layer, name)) for name in STEERING}
        servers = {name: state.params[key] for name, key in keys.items() if key in state.params}
        gate_E = _joined(servers) if kept is None else kept[layer].to(servers["router"].device)
        own = {"router": gate_E[:, : spec.hidden_size], "router_bias": gate_E[:, spec.hidden_size :].flatten()}
        rows |= to_keys(layer, {name: dict(enumerate(part)) for name, part in own.items() if name in servers})
    return rows


def sent_gate(plan: ExpertPlan) -> Tensor:
    """Return the gate that a plan with ``rows`` for every expert starts from."""
    layers, experts = plan.permitted_LE.shape
    sent = [of_layer(layer, plan.extras.rows) for layer in range(layers)]
    whole = [{name: torch.stack([rows[e] for e in range(experts)]) for name, rows in layer.items()} for layer in sent]
    return torch.stack([_joined(layer) for layer in whole])


def grown_gate(plan: ExpertPlan, trained: Mapping[str, Tensor], *, deltas: bool = False) -> Tensor:
    """Return the client's gate after its round: that of the plan, with the rows that learnt replaced.

    Args:
        plan: with ``rows`` for every expert of every router, by layer.
        trained: new rows of the trainable experts by router key, ascending expert id.
        deltas: whether those are changes of the rows.
    """
    gate = sent_gate(plan)
    for layer, (gate_E, trained_E) in enumerate(zip(gate, plan.trainable_LE, strict=True)):
        if trained_E.any():
            places, learnt = torch.from_numpy(trained_E), _joined(of_layer(layer, trained))
            gate_E[places] = gate_E[places] + learnt if deltas else learnt
    return gate


def _joined(layer: Mapping[str, Tensor]) -> Tensor:
    """A layer's router, and its bias as one more column where it has one."""
    router, bias = layer["router"], layer.get("router_bias")
    return router if bias is None else torch.cat([router, bias[:, None]], dim=1)
