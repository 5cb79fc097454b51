"""Updates without deltas as JSON: what ranks tell each other and metrics show."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from msgspec import convert, to_builtins
from torch import Tensor

from fedmoe_core.messages.update import ClientUpdate


def report_of(update: ClientUpdate) -> dict[str, Any]:
    """Put all of the update but its deltas into JSON types; floats and tensors survive the round trip bit for bit."""
    report: dict[str, Any] = to_builtins(replace(update, deltas={}), enc_hook=_packed)
    return report


def update_of(report: Mapping[str, Any]) -> ClientUpdate:
    """Invert ``report_of``; deltas are empty."""
    return convert(report, ClientUpdate, dec_hook=_unpacked)


def _packed(value: Any) -> Any:
    """A tensor, or an array as float64 or bool, as its dtype, shape and bytes; a number of numpy's as Python's."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value if value.dtype == bool else value.astype(np.float64))
    tensor: Tensor = value
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"dtype": dtype, "shape": list(tensor.shape), "data": base64.b64encode(data).decode()}


def _unpacked(kind: type, entry: Mapping[str, Any]) -> Tensor | np.ndarray:
    tensor = torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]))
    if data := bytearray(base64.b64decode(entry["data"])):
        tensor.view(-1).view(torch.uint8).copy_(torch.frombuffer(data, dtype=torch.uint8))
    return tensor if kind is Tensor else tensor.numpy()
