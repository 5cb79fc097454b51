"""Slots of a layer: how experts are laid out in them, and what a plan may change of them besides its masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from fedmoe_core.layer.state import STEERING
from fedmoe_kernels.quantized import Quantized
from fedmoe_kernels.slot_map import SlotMap

ExpertMask = Tensor | np.ndarray | Sequence[bool]  # bool (E,)


def check_masks(
    permitted: ExpertMask | None, trainable: ExpertMask | None, num_experts: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return numpy bool (E,) masks of the permitted and of the trainable experts, None filled in.

    Raises:
        ValueError: an empty permitted set, or masks of the wrong shape, kind or inclusion.
    """
    held = _mask("permitted", permitted, np.ones(num_experts, dtype=bool))
    trains = _mask("trainable", trainable, held)
    if not held.any():
        raise ValueError("no expert is permitted; permit at least one of every MoE layer")
    if (trains & ~held).any():
        raise ValueError(f"trainable expert {np.flatnonzero(trains & ~held)[0]} is not permitted; permit it or drop it")
    return held, trains


def _mask(name: str, mask: ExpertMask | None, default: np.ndarray) -> np.ndarray:
    if mask is None:
        return default
    array = mask.cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask)
    if array.dtype != np.bool_ or array.shape != default.shape:
        raise ValueError(f"{name} is {array.dtype} of shape {array.shape}; give a bool mask of shape {default.shape}")
    return array


def stack(rows: Mapping[int, Tensor] | Tensor, ids: Sequence[int], like: Tensor) -> Tensor:
    """Make a fresh tensor of the rows ``ids``; with no ids, an empty one shaped as the rows of ``like`` (any, ...).

    OwnRows are read one after another, so that those made on reading never exist all at once.
    """
    stacked = like.new_empty((0, *like.shape[1:]))
    for place, e in enumerate(ids):
        row = rows[e].detach()
        if not place:
            stacked = row.new_empty((len(ids), *row.shape))
        stacked[place] = row
    return stacked


def frozen_stack(
    rows: Mapping[int, Tensor],
    coded: Mapping[int, Quantized],
    ids: Sequence[int],
    *,
    frozen_format: str | None,
    like: Tensor,
) -> Tensor | Quantized:
    """Stack the rows ``ids`` in their dtype, or in ``frozen_format``.

    Experts in ``coded``, stacks of one, keep their codes and scales; the others are quantised from their rows.
    """
    if frozen_format is None:
        return stack(rows, ids, like)
    parts = [coded[e] if e in coded else Quantized.of(rows[e][None], frozen_format) for e in ids]
    parts = parts or [Quantized.of(stack(rows, (), like), frozen_format)]
    whole = None if parts[0].whole is None else torch.cat([p.whole for p in parts if p.whole is not None])
    return Quantized(torch.cat([p.codes for p in parts]), torch.cat([p.scale for p in parts]), frozen_format, whole)


OwnRows = Mapping[str, Mapping[int, Tensor]]  # tensor name -> expert id -> row
NO_ROWS: OwnRows = {}


def slot_map_of(
    held_E: np.ndarray, trains_E: np.ndarray, alias_E: np.ndarray | None, *, rows_per_slot: int | None
) -> SlotMap:
    """Make the map of a layer's masks, bool (E,); with ``alias_E``, int (E,), absent experts are served by held ones.

    It is a real one on the CPU, even where new tensors are on "meta" or fake.

    Raises:
        ValueError: as ``SlotMap.shared``.
    """
    with unset_fake_temporarily(), torch.device("cpu"):
        masks = torch.from_numpy(held_E.copy()), torch.from_numpy(trains_E.copy())
        if alias_E is None:
            return SlotMap.build(*masks, rows_per_slot=rows_per_slot)
        alias = torch.from_numpy(np.asarray(alias_E, dtype=np.int64).copy())
        return SlotMap.shared(*masks, alias_E=alias, rows_per_slot=rows_per_slot)


def order_of_rows(experts: tuple[int, ...]) -> Tensor | None:
    """Return the place of each expert's row, (E,) int64, real and on the CPU; None where the rows are in order."""
    if experts == tuple(range(len(experts))):
        return None
    with unset_fake_temporarily():
        return torch.tensor(experts, device="cpu").argsort()


def check_rows(rows: OwnRows, like: Mapping[str, Tensor], held_E: np.ndarray) -> None:
    """Refuse rows that do not fit the tensors (E, ...) they stand in for.

    Raises:
        ValueError: an unknown name, an expert that is not held (router rows may be), another shape or dtype.
    """
    for name, given in rows.items():
        if name not in like:
            raise ValueError(f"rows of {name!r} are given; this layer has {', '.join(like)}")
        for e, row in given.items():
            if not 0 <= e < len(held_E) or (name not in STEERING and not held_E[e]):
                raise ValueError(f"a row of {name} is given for expert {e}, which is not held here; permit it")
            if row.shape != like[name].shape[1:] or row.dtype != like[name].dtype:
                raise ValueError(
                    f"the row of {name} for expert {e} is {row.dtype} {tuple(row.shape)}; "
                    f"this layer needs {like[name].dtype} {tuple(like[name].shape[1:])}"
                )
