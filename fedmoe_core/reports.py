"""Updates made from local results, and updates without deltas as JSON: what ranks tell each other and metrics show."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmoe_core.budget import Cost
from fedmoe_core.client import LocalResult
from fedmoe_core.memory import tensor_bytes
from fedmoe_core.plan import ExpertPlan
from fedmoe_core.update import ClientProfile, ClientUpdate, Evaluation, profile_arrays

# Fields with a special form in a report; the others are plain JSON values already.
ELSEWHERE = ("deltas", "profile", "validation_profile", "validation", "cost", "private")


def finished_update(
    plan: ExpertPlan,
    result: LocalResult,
    *,
    samples: int,
    sample_weight: float,
    expert_weight_LE: np.ndarray,
    router_weight_LE: np.ndarray,
    gate_weight: float,
    deltas: dict[str, Tensor] | None = None,
    private: Mapping[str, Tensor] | None = None,
    private_travels: bool = False,
    metrics: Mapping[str, float] | None = None,
) -> ClientUpdate:
    """Make the answer of a client that trained: its deltas, profile and cost under an algorithm's weights.

    Args:
        plan, result: what was asked and what came of it.
        samples, sample_weight, expert_weight_LE, router_weight_LE, gate_weight: as ``ClientUpdate``.
        deltas: instead of the result's own, where the algorithm recasts them; None = as they are.
        private, metrics: as ``ClientUpdate``.
        private_travels: whether the private tensors really go to the server, so that their bytes are charged; the plan
            must then leave room for them (``surcharge=Cost(bytes_up=...)`` charges and predicts them in one).
    """
    private = {name: tensor.detach().cpu().clone() for name, tensor in (private or {}).items()}
    sent = Cost(bytes_up=tensor_bytes(private.values()) if private_travels else 0)
    return ClientUpdate(
        client=plan.client,
        round=plan.round,
        deltas=result.deltas if deltas is None else deltas,
        expert_weight_LE=expert_weight_LE,
        router_weight_LE=router_weight_LE,
        gate_weight=gate_weight,
        sample_weight=sample_weight,
        profile=result.profile,
        cost=result.cost.with_extra(sent),
        samples=samples,
        loss_first=result.losses[0] if result.losses else float("nan"),
        loss_last=result.losses[-1] if result.losses else float("nan"),
        steps=len(result.losses),
        validation=result.validation,
        validation_profile=result.validation_profile,
        private=private,
        metrics={name: float(value) for name, value in (metrics or {}).items()},
    )


def failed_update(plan: ExpertPlan, result: LocalResult, sample_weight: float) -> ClientUpdate:
    """Make the report of a client whose round failed: nothing to aggregate, the reason, and what it still cost."""
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
    """Put all of the update but its deltas into JSON types; floats and tensors survive the round trip bit for bit."""
    plain = {f.name: getattr(update, f.name) for f in fields(update) if f.name not in ELSEWHERE}
    plain["expert_weight_LE"] = update.expert_weight_LE.tolist()
    plain["router_weight_LE"] = update.router_weight_LE.tolist()
    plain["cost"] = asdict(update.cost)
    plain["profile"] = _profile_report(update.profile)
    plain["validation_profile"] = _profile_report(update.validation_profile)
    plain["validation"] = None if update.validation is None else asdict(update.validation)
    plain["private"] = {name: _tensor_report(tensor) for name, tensor in update.private.items()}
    return plain


def update_of(report: Mapping[str, Any]) -> ClientUpdate:
    """Invert ``report_of``; deltas are empty."""
    validation = report["validation"]
    rest = {
        **report,
        "profile": _profile_of(report["profile"]),
        "validation_profile": _profile_of(report["validation_profile"]),
        "validation": None if validation is None else Evaluation(**validation),
        "private": {name: _tensor_of(entry) for name, entry in report["private"].items()},
        "cost": Cost(**report["cost"]),
        "expert_weight_LE": np.asarray(report["expert_weight_LE"], dtype=np.float64),
        "router_weight_LE": np.asarray(report["router_weight_LE"], dtype=np.float64),
    }
    return ClientUpdate(deltas={}, **rest)


def refused(update: ClientUpdate, reason: str) -> ClientUpdate:
    """Return the same report with nothing in it that could enter the model or the server's memory."""
    return replace(
        update,
        deltas={},
        expert_weight_LE=np.zeros_like(update.expert_weight_LE),
        router_weight_LE=np.zeros_like(update.router_weight_LE),
        gate_weight=0.0,
        profile=None,
        validation=None,
        validation_profile=None,
        private={},
        metrics={},
        status="refused",
        error=reason,
    )


def _profile_report(profile: ClientProfile | None) -> dict[str, Any]:
    arrays = {} if profile is None else profile_arrays(profile)
    return {name: array.tolist() for name, array in arrays.items()}


def _profile_of(report: Mapping[str, Any]) -> ClientProfile | None:
    if not report:
        return None
    return ClientProfile(
        **{name: np.asarray(value, dtype=bool if name == "held_LE" else np.float64) for name, value in report.items()}
    )


def _tensor_report(tensor: Tensor) -> dict[str, Any]:
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"dtype": dtype, "shape": list(tensor.shape), "data": base64.b64encode(data).decode()}


def _tensor_of(entry: Mapping[str, Any]) -> Tensor:
    data = bytearray(base64.b64decode(entry["data"]))
    dtype = getattr(torch, entry["dtype"])
    empty = torch.empty(0, dtype=torch.uint8)
    return (torch.frombuffer(data, dtype=torch.uint8) if data else empty).view(dtype).reshape(entry["shape"])
