"""How a layer's expert weights are stored and passed: stacked by slot, trainable slots first, adapters next to them.

Shapes: B slots, Bt trainable slots, H hidden, I intermediate, F = 2 * I for gated activations and I for the others,
r LoRA rank, Bl slots with an adapter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fedmoe_kernels.quantized import Quantized


@dataclass(frozen=True, eq=False)
class ExpertWeights:
    """One stacked matrix or bias of all slots, trainable slots first; Bt is a shape, so no other gradient can exist.

    Attributes:
        trainable: (Bt, ...), usually a Parameter; Bt may be 0.
        frozen: (B - Bt, ...), usually a buffer, a matrix also `Quantized`; None when every slot is trainable. In the
            dtype of `trainable`; beside float32 masters it may be in autocast's, which saves a cast in every forward.

    Raises:
        ValueError: when the two differ in trailing shape or kind of number, or the frozen part asks for a gradient.

    Example:
        >>> import torch
        >>> weights = ExpertWeights(torch.zeros(2, 8, 4, requires_grad=True), torch.zeros(3, 8, 4))
        >>> len(weights.trainable), len(weights.frozen)  # five slots, two of which can have a gradient
        (2, 3)
    """

    trainable: Tensor
    frozen: Tensor | Quantized | None = None

    def __post_init__(self) -> None:
        if self.frozen is None:
            return
        plain = self.frozen if isinstance(self.frozen, Tensor) else None
        if self.trainable.shape[1:] != self.frozen.shape[1:] or not (plain is None or plain.is_floating_point()):
            raise ValueError(
                f"ExpertWeights: trainable is {what(self.trainable)}, frozen {what(self.frozen)}; "
                "they must agree in every axis but the first, and be floating"
            )
        if plain is not None and plain.requires_grad:
            raise ValueError("ExpertWeights: the frozen part requires a gradient; pass it detached, as a buffer")


@dataclass(frozen=True, eq=False)
class ExpertLora:
    """Adapters per slot, W_in + scale * b_in @ a_in and W_out + scale * b_out @ a_out, over frozen base experts.

    Attributes:
        a_in, b_in, a_out, b_out: (Bl, r, H), (Bl, F, r), (Bl, r, I), (Bl, H, r); slots from Bl on have no adapter.
        scale: one number, or (Bl,); a constant, it gets no gradient.
        base_of_slot_B: (B,) int64, the row of `w_in`, `w_out` and the biases that each slot runs, so that clients of a
            cohort can share them; None = its own index.
    """

    a_in: Tensor
    b_in: Tensor
    a_out: Tensor
    b_out: Tensor
    scale: float | Tensor = 1.0
    base_of_slot_B: Tensor | None = None


class Stack(NamedTuple):
    """A stacked tensor as the operator takes it, with the name that its errors use."""

    name: str
    trainable: Tensor
    frozen: Tensor | Quantized | None

    @property
    def rows(self) -> int:
        """Slots, or base experts, of both parts."""
        return self.trainable.shape[0] + (0 if self.frozen is None else self.frozen.shape[0])

    @property
    def storage(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """(trainable, frozen, scale, whole) with the codes as frozen where it is quantised."""
        if isinstance(self.frozen, Quantized):
            return self.trainable, self.frozen.codes, self.frozen.scale, self.frozen.whole
        return self.trainable, self.frozen, None, None

    @property
    def format(self) -> str:
        """The name of the frozen part's format, "" where it holds plain numbers."""
        return self.frozen.format if isinstance(self.frozen, Quantized) else ""

    def cast(self, dtype: torch.dtype) -> Stack:
        """Return the same weights in another dtype; codes and scales stay as they are."""
        frozen = self.frozen.to(dtype) if isinstance(self.frozen, Tensor) else self.frozen
        return Stack(self.name, self.trainable.to(dtype), frozen)

    def whole(self) -> Tensor:
        """Lay both parts end to end, dequantised."""
        if self.frozen is None:
            return self.trainable
        dtype = self.trainable.dtype
        frozen = self.frozen.dequantize(dtype) if isinstance(self.frozen, Quantized) else self.frozen
        return torch.cat([self.trainable, frozen])


def stacked(**given: Tensor | ExpertWeights | None) -> dict[str, Stack]:
    """Bring both forms to one; all four must be given in the same form and with the same Bt."""
    forms = {name: value for name, value in given.items() if value is not None}
    records = {name for name, value in forms.items() if isinstance(value, ExpertWeights)}
    if records and records != set(forms):
        other = next(name for name in forms if name not in records)
        raise ValueError(f"{other} is a plain tensor among ExpertWeights; give all weights and biases in one form")
    return {
        name: Stack(name, value.trainable, value.frozen)
        if isinstance(value, ExpertWeights)
        else Stack(name, value, None)
        for name, value in forms.items()
    }


def what(value: Tensor | Quantized) -> str:
    """Describe a tensor by dtype and shape, as errors name it."""
    if isinstance(value, Quantized):
        return f"{value.format} in blocks of {value.block} {tuple(value.shape)}"
    return f"{value.dtype} {tuple(value.shape)}"
