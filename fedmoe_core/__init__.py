"""The federated layer: budgets, plans, clients, exact aggregation and the simulator."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedmoe_core.algorithms.base import Algorithm
    from fedmoe_core.budget.limits import Budget
    from fedmoe_core.config.run_config import Config
    from fedmoe_core.config.systems import Equation, System
    from fedmoe_core.layer.moe import MoE
    from fedmoe_core.layer.optimizer import following
    from fedmoe_core.layer.recording import recording
    from fedmoe_core.layer.routing_rule import RoutingRule
    from fedmoe_core.layer.shared_expert import SharedExpert
    from fedmoe_core.layer.state import LayerState
    from fedmoe_core.messages.plan import ExpertPlan, Extras
    from fedmoe_core.messages.result import LocalResult
    from fedmoe_core.messages.update import ClientUpdate, Weights
    from fedmoe_core.model.plain import plain
    from fedmoe_core.server.accumulator import Accumulator
    from fedmoe_core.server.means import Sums
    from fedmoe_core.server.planning import make_plan, plan_of_masks
    from fedmoe_core.server.state import ServerState
    from fedmoe_core.simulation import run as simulate

# Before torch loads. GNU OpenMP spins at every barrier for as long as it takes while a core is busy elsewhere: with 4
# threads on 4 cores, two of them shared, a warm-up step took 6.5 s instead of 0.08 s; spinning briefly, 0.22 s.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# Public names and the rooms they live in; loaded on first use, so that the command's --help needs no torch.
_HOMES = {
    "Accumulator": "server.accumulator",
    "Algorithm": "algorithms.base",
    "Budget": "budget.limits",
    "ClientUpdate": "messages.update",
    "Config": "config.run_config",
    "Equation": "config.systems",
    "ExpertPlan": "messages.plan",
    "Extras": "messages.plan",
    "LayerState": "layer.state",
    "LocalResult": "messages.result",
    "MoE": "layer.moe",
    "RoutingRule": "layer.routing_rule",
    "ServerState": "server.state",
    "SharedExpert": "layer.shared_expert",
    "Sums": "server.means",
    "System": "config.systems",
    "Weights": "messages.update",
    "following": "layer.optimizer",
    "make_plan": "server.planning",
    "plain": "model.plain",
    "plan_of_masks": "server.planning",
    "recording": "layer.recording",
}
__all__ = [
    "Accumulator",
    "Algorithm",
    "Budget",
    "ClientUpdate",
    "Config",
    "Equation",
    "ExpertPlan",
    "Extras",
    "LayerState",
    "LocalResult",
    "MoE",
    "RoutingRule",
    "ServerState",
    "SharedExpert",
    "Sums",
    "System",
    "Weights",
    "following",
    "make_plan",
    "plain",
    "plan_of_masks",
    "recording",
    "simulate",
]


def __getattr__(name: str) -> Any:
    if name == "simulate":
        return import_module("fedmoe_core.simulation.run")
    if name in _HOMES:
        return getattr(import_module(f"fedmoe_core.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'fedmoe_core' has no attribute {name!r}")
