"""How the kernels see one stacked matrix: the trainable slots in one tensor, the frozen ones in a second.

Shapes: B slots, Bt trainable slots, N x K one slot's matrix as it is stored.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from fedmoe_kernels.gpu.launch import TensorDescriptor


class Stored(NamedTuple):
    """One stacked matrix (or bias, without the last axis) of all slots.

    Attributes:
        trainable: (Bt, N, K); Bt may be 0.
        frozen: (B - Bt, N, K); int8 codes of that shape, or uint8 of (B - Bt, N, K / 2) with two 4-bit codes a byte,
            when `scale` is given; None = every slot is in `trainable`.
        scale: (B - Bt, N, K / group), what a group of codes is multiplied by.
        base_of_slot_B: (B,) int64, the row of the two tensors laid end to end that a slot runs; None = its own index.
    """

    trainable: Tensor
    frozen: Tensor | None = None
    scale: Tensor | None = None
    base_of_slot_B: Tensor | None = None

    def pointers(self, name: str) -> dict[str, Any]:
        """Kernel arguments `name`, `name_frozen` (the same tensor where nothing is frozen) by address."""
        return {name: self.trainable, f"{name}_frozen": self.trainable if self.frozen is None else self.frozen}

    def descriptors(self, name: str, block: tuple[int, int]) -> dict[str, Any]:
        """The same two arguments as tensor descriptors of blocks (1, *block); an empty part repeats the other."""
        parts = [p for p in (self.trainable, self.frozen) if p is not None and p.shape[0]]
        first, last = (TensorDescriptor.from_tensor(p, [1, *block]) for p in (parts[0], parts[-1]))
        return {name: first, f"{name}_frozen": last}
