"""A client update without its deltas, as plain JSON: what ranks tell each other and what metrics are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any

import numpy as np

from fedmoe_core.budget import Cost
from fedmoe_core.update import ClientProfile, ClientUpdate, profile_arrays


def report_of(update: ClientUpdate) -> dict[str, Any]:
    """Everything of the update but its deltas, in JSON types; floats survive the round trip bit for bit."""
    plain = {f.name: getattr(update, f.name) for f in fields(update) if f.name not in ("deltas", "profile", "cost")}
    plain["expert_weight_LE"] = update.expert_weight_LE.tolist()
    plain["router_weight_LE"] = update.router_weight_LE.tolist()
    plain["cost"] = asdict(update.cost)
    arrays = {} if update.profile is None else profile_arrays(update.profile)
    plain["profile"] = {name: array.tolist() for name, array in arrays.items()}
    return plain


def update_of(report: Mapping[str, Any]) -> ClientUpdate:
    """The inverse of ``report_of``; deltas are empty."""
    profile = None
    if report["profile"]:
        arrays = {
            name: np.asarray(value, dtype=bool if name == "held_LE" else np.float64)
            for name, value in report["profile"].items()
        }
        profile = ClientProfile(**arrays)
    rest = {
        **report,
        "profile": profile,
        "cost": Cost(**report["cost"]),
        "expert_weight_LE": np.asarray(report["expert_weight_LE"], dtype=np.float64),
        "router_weight_LE": np.asarray(report["router_weight_LE"], dtype=np.float64),
    }
    return ClientUpdate(deltas={}, **rest)


def refused(update: ClientUpdate, reason: str) -> ClientUpdate:
    """The same report with nothing in it that could enter the model: no deltas, no weights, no profile."""
    return replace(
        update,
        deltas={},
        expert_weight_LE=np.zeros_like(update.expert_weight_LE),
        router_weight_LE=np.zeros_like(update.router_weight_LE),
        gate_weight=0.0,
        profile=None,
        status="refused",
        error=reason,
    )
