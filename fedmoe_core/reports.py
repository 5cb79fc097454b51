"""Updates made from local results, and updates without deltas as JSON: what ranks tell each other and metrics show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any

import numpy as np

from fedmoe_core.budget import Cost
from fedmoe_core.client import LocalResult
from fedmoe_core.plan import ExpertPlan
from fedmoe_core.update import ClientProfile, ClientUpdate, profile_arrays


def finished_update(
    plan: ExpertPlan,
    result: LocalResult,
    *,
    samples: int,
    sample_weight: float,
    expert_weight_LE: np.ndarray,
    router_weight_LE: np.ndarray,
    gate_weight: float,
) -> ClientUpdate:
    """The answer of a client that trained: its deltas, profile and cost under an algorithm's weights."""
    return ClientUpdate(
        client=plan.client,
        round=plan.round,
        deltas=result.deltas,
        expert_weight_LE=expert_weight_LE,
        router_weight_LE=router_weight_LE,
        gate_weight=gate_weight,
        sample_weight=sample_weight,
        profile=result.profile,
        cost=result.cost,
        samples=samples,
        loss_first=result.losses[0] if result.losses else float("nan"),
        loss_last=result.losses[-1] if result.losses else float("nan"),
        steps=len(result.losses),
    )


def failed_update(plan: ExpertPlan, result: LocalResult, sample_weight: float) -> ClientUpdate:
    """The report of a client whose round failed: nothing to aggregate, the reason, and what it cost all the same."""
    nothing_LE = np.zeros(plan.trainable_LE.shape)
    return ClientUpdate(
        client=plan.client,
        round=plan.round,
        deltas={},
        expert_weight_LE=nothing_LE,
        router_weight_LE=nothing_LE,
        gate_weight=0.0,
        sample_weight=sample_weight,
        profile=None,
        cost=result.cost,
        samples=0,
        status="failed",
        error=result.error,
    )


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
