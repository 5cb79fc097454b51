"""The frozen base of experts under adapters: a client keeps it, each expert under its digest, and is sent what is new.

Which experts it should still have, a plan says by ``Extras.cached_LE``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedmoe_core.base.tensor_key import DENSE
from fedmoe_core.layer.state import BIASES, MATRICES
from fedmoe_core.messages.plan import ExpertPlan
from fedmoe_core.messages.wire.envelope import WireError, array_of, by_prefix
from fedmoe_core.model.spec import ModelSpec, ParamSpec, model_hash

DIGEST = 32  # bytes of sha256
Place = tuple[int, int]  # layer, expert


@dataclass(frozen=True)
class Base:
    """What the server says of the base in one task.

    Attributes:
        omitted_LE: permitted experts whose base does not travel, for the client has it.
        digests: hex, of every permitted expert.
    """

    omitted_LE: np.ndarray
    digests: Mapping[Place, str]


def base_params(spec: ModelSpec, plan: ExpertPlan) -> tuple[ParamSpec, ...]:
    """Return the tensors of experts that this plan keeps frozen under adapters; none where it keeps nothing."""
    if plan.extras.cached_LE is None:
        return ()
    of_experts = [param for param in spec.params if param.layer != DENSE and param.name in (*MATRICES, *BIASES)]
    return tuple(param for param in of_experts if param.kind == "frozen" or plan.extras.lora_rank is not None)


def places_of(mask_LE: np.ndarray) -> list[Place]:
    """Return the experts of a mask, by layer and then by id."""
    return [(int(layer), int(expert)) for layer, expert in np.argwhere(mask_LE)]


def base_row(param: ParamSpec, expert: int, plan: ExpertPlan, params: Mapping[str, Tensor]) -> Tensor:
    """Return the base of one expert: the plan's own row, else that of the global model."""
    own = plan.extras.rows.get(param.key, {}).get(expert)
    return (params[param.key][expert] if own is None else own).cpu()


def expert_digest(specs: Sequence[ParamSpec], place: Place, plan: ExpertPlan, params: Mapping[str, Tensor]) -> str:
    """Return the digest of one expert's base, hex."""
    own = [param for param in specs if param.layer == place[0]]
    return model_hash({param.key: base_row(param, place[1], plan, params) for param in own})


def base_tensors(
    base: Base, specs: Sequence[ParamSpec], plan: ExpertPlan, params: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the tensors of a message that bring the base of a plan, or name it."""
    digests = [bytearray.fromhex(base.digests[place]) for place in places_of(plan.permitted_LE)]
    tensors = {
        "mask/omitted": torch.from_numpy(base.omitted_LE),
        "base/digests": torch.tensor([list(digest) for digest in digests], dtype=torch.uint8),
    }
    for param in specs:
        ids = np.flatnonzero(plan.permitted_LE[param.layer] & ~base.omitted_LE[param.layer]).tolist()
        rows = [base_row(param, expert, plan, params) for expert in ids]
        empty = torch.empty((0, *param.shape[1:]), dtype=param.dtype)
        tensors[f"experts/{param.key}"] = torch.stack(rows) if rows else empty
    return tensors


def read_base(
    sent: Mapping[str, Tensor], plan: ExpertPlan, spec: ModelSpec, shelf: Callable[[str], Mapping[str, Tensor] | None]
) -> tuple[dict[str, Tensor] | None, dict[str, dict[str, Tensor]]]:
    """Return the base of a plan by key, a row for each permitted expert; and what of it is new, by digest.

    Args:
        sent: tensors of the message.
        plan: that came with them.
        spec: of the client's own model.
        shelf: gives an expert's base by digest; None where the client does not have it.

    Returns:
        None instead of the rows where the client lacks some that did not travel.

    Raises:
        WireError: a table is missing or of another form, or rows are not those that their digest names.
    """
    specs, shape_LE = base_params(spec, plan), plan.permitted_LE.shape
    if not specs:
        return {}, {}
    omitted_LE = array_of(sent, "mask/omitted", torch.bool, shape_LE)
    places = places_of(plan.permitted_LE)
    digests = array_of(sent, "base/digests", torch.uint8, (len(places), DIGEST))
    travelled = by_prefix(sent, "experts")
    for param in specs:
        count = int((plan.permitted_LE & ~omitted_LE)[param.layer].sum())
        tensor = travelled.get(param.key)
        if tensor is None or tuple(tensor.shape) != (count, *param.shape[1:]) or tensor.dtype != param.dtype:
            raise WireError(f"a task has no {param.key} of {count} experts; use one model on both sides")
    rows: dict[str, list[Tensor]] = {param.key: [] for param in specs}
    new, complete = {}, True
    next_row = {param.key: iter(travelled[param.key]) for param in specs}
    for place, digest in zip(places, (bytes(line).hex() for line in digests), strict=True):
        own = [param.key for param in specs if param.layer == place[0]]
        found = shelf(digest) if omitted_LE[place] else _taken(own, next_row, digest)
        if found is None or found.keys() != {*own}:
            complete = False
            continue
        if not omitted_LE[place]:
            new[digest] = dict(found)
        for key in own:
            rows[key].append(found[key])
    return ({key: torch.stack(each) for key, each in rows.items()} if complete else None), new


def _taken(keys: Sequence[str], next_row: Mapping[str, Iterator[Tensor]], digest: str) -> dict[str, Tensor]:
    found = {key: next(next_row[key]) for key in keys}
    if model_hash(found) != digest:
        raise WireError("a task has a base of an expert that is not the one it names")
    return found
