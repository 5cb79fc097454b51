"""Updates without deltas as JSON: what ranks tell each other and metrics show."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmoe_core.budget.limits import Cost
from fedmoe_core.messages.profile import ClientProfile, profile_arrays
from fedmoe_core.messages.update import ClientUpdate
from fedmoe_core.model.spec import Evaluation

# Fields with a special form in a report; the others are plain JSON values already.
ELSEWHERE = ("deltas", "profile", "validation_profile", "validation", "cost", "private")


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
