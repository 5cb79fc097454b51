"""The federated layer: budgets, plans, clients, exact aggregation and the simulator."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

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
    "ExpertPlan": "messages.plan",
    "MoE": "layer.moe",
}
__all__ = ["Accumulator", "Algorithm", "Budget", "ClientUpdate", "Config", "ExpertPlan", "MoE", "simulate"]


def __getattr__(name: str) -> Any:
    if name == "simulate":
        return import_module("fedmoe_core.simulation.run")
    if name in _HOMES:
        return getattr(import_module(f"fedmoe_core.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'fedmoe_core' has no attribute {name!r}")
