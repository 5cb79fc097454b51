"""Slots of a layer: how experts are laid out in them, and what a plan may change of them besides its masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from fedmoe_core.layer.state import STEERING
from fedmoe_kernels.quantized import Quantized
from fedmoe_kernels.slot_map import SlotMap


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
NO_ROWS: OwnRows = MappingProxyType({})


def slot_map_of(
    held_E: np.ndarray, trains_E: np.ndarray, alias_E: np.ndarray | None, *, rows_per_slot: int | None
) -> SlotMap:
    """Make the map of a layer's masks, bool (E,); with ``alias_E``, int (E,), absent experts are served by held ones.

    Raises:
        ValueError: as ``SlotMap.shared``.
    """
    masks = torch.from_numpy(held_E.copy()), torch.from_numpy(trains_E.copy())
    if alias_E is None:
        return SlotMap.build(*masks, rows_per_slot=rows_per_slot)
    alias = torch.from_numpy(np.asarray(alias_E, dtype=np.int64).copy())
    return SlotMap.shared(*masks, alias_E=alias, rows_per_slot=rows_per_slot)


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
