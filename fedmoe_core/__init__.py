"""The federated layer: budgets, plans, clients, exact aggregation and the simulator."""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Public names and the rooms they live in; loaded on first use, so that the command's --help needs no torch.
_HOMES = {
    "Accumulator": "aggregate",
    "Budget": "budget",
    "ClientUpdate": "update",
    "Config": "config",
    "ExpertPlan": "plan",
    "MoE": "layer",
}
__all__ = ["Accumulator", "Budget", "ClientUpdate", "Config", "ExpertPlan", "MoE", "simulate"]


def __getattr__(name: str) -> Any:
    if name == "simulate":
        return import_module("fedmoe_core.simulate")
    if name in _HOMES:
        return getattr(import_module(f"fedmoe_core.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'fedmoe_core' has no attribute {name!r}")
