"""How a layer's experts lie in slots: stacks or codes, whose slot serves an absent expert, a client's own rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedmoe_kernels.quantized import Quantized
from fedmoe_kernels.routing import SlotMap

ExpertMask = Tensor | np.ndarray | Sequence[bool]  # bool (E,)
Rows = Mapping[str, Mapping[int, Tensor]]  # tensor name -> expert id -> row


@dataclass(frozen=True)
class LayerState:
    """The weights of some experts of one MoE layer, in global coordinates.

    Attributes:
        experts: expert ids, ascending; place i of ``w_in`` and ``w_out`` is expert ``experts[i]``.
        router: (E, H), always of all experts.
        w_in: (len(experts), 2I, H) for gated activations [gate; up], (len(experts), I, H) else.
        w_out: (len(experts), H, I).
    """

    experts: tuple[int, ...]
    router: Tensor
    w_in: Tensor
    w_out: Tensor

    def check(self, experts: int, hidden: int, inner: int, width: int) -> None:
        """Refuse a state that is not of such a layer.

        Raises:
            ValueError: a tensor of another shape.
        """
        held = len(self.experts)
        want = {"router": (experts, hidden), "w_in": (held, width, hidden), "w_out": (held, hidden, inner)}
        for name, shape in want.items():
            if tuple(getattr(self, name).shape) != shape:
                raise ValueError(f"{name} has shape {tuple(getattr(self, name).shape)}; this layer needs {shape}")


def mask_of(name: str, mask: ExpertMask | None, default: np.ndarray) -> np.ndarray:
    """A mask as numpy bool (E,), ``default`` where it is None.

    Raises:
        ValueError: another shape or kind.
    """
    if mask is None:
        return default
    array = mask.cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask)
    if array.dtype != np.bool_ or array.shape != default.shape:
        raise ValueError(f"{name} is {array.dtype} of shape {array.shape}; give a bool mask of shape {default.shape}")
    return array


def masks_of(experts: int, permitted: ExpertMask | None, trainable: ExpertMask | None) -> tuple[np.ndarray, np.ndarray]:
    """Numpy bool (E,) masks of the permitted and of the trainable experts, None filled in.

    Raises:
        ValueError: an empty permitted set, or masks of the wrong shape, kind or inclusion.
    """
    held = mask_of("permitted", permitted, np.ones(experts, dtype=bool))
    trains = mask_of("trainable", trainable, held)
    if not held.any():
        raise ValueError("no expert is permitted; permit at least one of every MoE layer")
    if (trains & ~held).any():
        raise ValueError(f"trainable expert {np.flatnonzero(trains & ~held)[0]} is not permitted; permit it or drop it")
    return held, trains


def slot_map_of(
    held_E: np.ndarray, trains_E: np.ndarray, alias_E: np.ndarray | None, *, rows_per_slot: int | None = None
) -> SlotMap:
    """The map of a layer's masks, bool (E,); with ``alias_E``, int (E,), absent experts are served by held ones.

    Raises:
        ValueError: as ``SlotMap.shared``.
    """
    masks = torch.from_numpy(held_E.copy()), torch.from_numpy(trains_E.copy())
    if alias_E is None:
        return SlotMap.build(*masks, rows_per_slot=rows_per_slot)
    aliases_E = torch.from_numpy(np.asarray(alias_E, dtype=np.int64).copy())
    return SlotMap.shared(*masks, alias_E=aliases_E, rows_per_slot=rows_per_slot)


def check_rows(rows: Rows, like: Mapping[str, Tensor], held_E: np.ndarray) -> None:
    """Refuse rows that do not fit the tensors (E, ...) they stand in for.

    Raises:
        ValueError: an unknown name, an expert that is not held (router rows may be anybody's), another shape or dtype.
    """
    for name, given in rows.items():
        if name not in like:
            raise ValueError(f"rows of {name!r} are given; this layer has {', '.join(like)}")
        for e, row in given.items():
            if not 0 <= e < len(held_E) or (name != "router" and not held_E[e]):
                raise ValueError(f"a row of {name} is given for expert {e}, which is not held here; permit it")
            if row.shape != like[name].shape[1:] or row.dtype != like[name].dtype:
                raise ValueError(
                    f"the row of {name} for expert {e} is {row.dtype} {tuple(row.shape)}; "
                    f"this layer needs {like[name].dtype} {tuple(like[name].shape[1:])}"
                )


def rows_of_layer(rows: Rows, layer: int) -> Rows:
    """The rows under ``moe.{layer}.{name}``, by the layer's own names."""
    prefix = f"moe.{layer}."
    return {key.removeprefix(prefix): given for key, given in rows.items() if key.startswith(prefix)}


def stack(rows: Mapping[int, Tensor] | Tensor, ids: Sequence[int], like: Tensor) -> Tensor:
    """A fresh tensor of the rows ``ids``; with no ids, an empty one shaped as the rows of ``like`` (any, ...)."""
    return torch.stack([rows[e].detach() for e in ids]) if ids else like.new_empty((0, *like.shape[1:]))


def frozen_stack(
    rows: Mapping[int, Tensor], coded: Mapping[int, Quantized], ids: Sequence[int], *, bits: int | None, like: Tensor
) -> tuple[Tensor, Tensor | None]:
    """(values, None) in the dtype of the rows, or (codes, scale) in ``bits`` bits.

    Experts in ``coded``, stacks of one, keep their codes and scales; the others are quantised from their rows.
    """
    if bits is None:
        return stack(rows, ids, like), None
    parts = [coded[e] if e in coded else Quantized.of(rows[e][None], bits, group_of(like.shape[-1])) for e in ids]
    parts = parts or [Quantized.of(stack(rows, (), like), bits, group_of(like.shape[-1]))]
    return torch.cat([p.codes for p in parts]), torch.cat([p.scale for p in parts])


def group_of(columns: int) -> int:
    """How many columns share a scale: 128, or the largest smaller multiple of 32 that divides them.

    Raises:
        ValueError: when 32 does not divide them.
    """
    for group in (128, 96, 64, 32):
        if columns % group == 0:
            return group
    raise ValueError(
        f"frozen_bits needs hidden_size and intermediate_size that 32 divides, not {columns}; leave it out"
    )
