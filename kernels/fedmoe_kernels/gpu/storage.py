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

    def descriptors(self, name: str, block: tuple[int, int], matrices: int = 1) -> dict[str, Any]:
        """The same two arguments as descriptors of blocks (matrices, *block); an empty part repeats the other."""
        parts = [p for p in (self.trainable, self.frozen) if p is not None and p.shape[0]]
        first, last = (TensorDescriptor.from_tensor(p, [matrices, *block]) for p in (parts[0], parts[-1]))
        return {name: first, f"{name}_frozen": last}

    @property
    def describable(self) -> bool:
        """Whether descriptors of it can exist: every row and both tensors begin at a multiple of 16 bytes."""
        return all(describable(p) for p in (self.trainable, self.frozen) if p is not None)

    @property
    def part(self) -> str:
        """What a kernel finds by `pointers`: "all" slots in the first tensor, or "both" tensors to choose from."""
        return "all" if self.frozen is None else "both"

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(t.nbytes for t in (self.trainable, self.frozen, self.scale) if t is not None)

    def split(self, halves: int) -> Stored:
        """The same memory with each slot's N rows as `halves` matrices of N / halves rows one after the other."""

        def apart(stack: Tensor | None) -> Tensor | None:
            if stack is None:
                return None
            slots, n, *depth = stack.shape
            return stack.view(slots * halves, n // halves, *depth)

        trainable = apart(self.trainable)
        assert trainable is not None
        return Stored(trainable, apart(self.frozen), apart(self.scale), self.base_of_slot_B)


class Direct(NamedTuple):
    """Where the rows of tokens that have at most one row each go when nothing is left to be summed: to token order.

    Attributes:
        tokens_R, places_R: (R,) int64, the token and the place t * K + j of each row.
        weights_TK: (T, K), what each row is multiplied by; None = 1.
        rows_TK: (T, K) int64; a token whose places are all -1 gets exact zeros.
    """

    tokens_R: Tensor
    places_R: Tensor
    weights_TK: Tensor | None
    rows_TK: Tensor


class RankTerm(NamedTuple):
    """What an adapter adds to a product of rows: scale * rows @ factor, on the slots that have one.

    Attributes:
        rows_Rr: (R, r), the rows times the adapter's other factor; not read where the slot has no adapter.
        factor: (Bl, N, r) as b_in and b_out lie, (Bl, r, N) as a_in and a_out lie.
        scale_B: (Bl,), any floating dtype.
    """

    rows_Rr: Tensor
    factor: Tensor
    scale_B: Tensor


def describable(tensor: Tensor) -> bool:
    """Whether a tensor descriptor of a contiguous tensor can exist: base and rows at multiples of 16 bytes."""
    return tensor.shape[-1] * tensor.element_size() % 16 == 0 and tensor.data_ptr() % 16 == 0


class RowIndex(NamedTuple):
    """Where each row comes from: three fields of `Routing`.

    Attributes:
        tokens_R, places_R: (R,) int64, the token t and the place t * K + j of each row; not read from row N on.
        weights_TK: (T, K), the routing weight of each place.
    """

    tokens_R: Tensor
    places_R: Tensor
    weights_TK: Tensor
