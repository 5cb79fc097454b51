"""How the kernels see one stacked matrix: the trainable slots in one tensor, the frozen ones in a second.

Shapes: B slots, Bt trainable slots, N x K one slot's matrix as it is stored.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedmoe_kernels.configs import Tile
from fedmoe_kernels.gpu.launch import TensorDescriptor, power_of_2


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
        """Return the kernel arguments `name` and `name_frozen` by address; None where nothing is frozen."""
        return {name: self.trainable, f"{name}_frozen": self.frozen}

    def descriptors(self, name: str, block: tuple[int, int], matrices: int = 1) -> dict[str, Any]:
        """Return those two arguments as descriptors of blocks (matrices, *block); an empty part repeats the other.

        A descriptor costs the host 15 us, so there is none for a part that is not there.
        """
        parts = [p for p in (self.trainable, self.frozen) if p is not None and p.shape[0]]
        made = [TensorDescriptor.from_tensor(p, [matrices, *block]) for p in parts]
        return {name: made[0], f"{name}_frozen": None if self.frozen is None else made[-1]}

    @property
    def describable(self) -> bool:
        """Whether a kernel can read it by descriptor: plain numbers, rows and tensors at multiples of 16 bytes."""
        return self.scale is None and all(describable(p) for p in (self.trainable, self.frozen) if p is not None)

    @property
    def part(self) -> str:
        """What a kernel finds by `pointers`: "all" slots in the first tensor, or "both" tensors to choose from."""
        return "all" if self.frozen is None else "both"

    @property
    def parts(self) -> tuple[str, ...]:
        """The launches of a product with this matrix, each by the slots that it serves, see `served`.

        One, except that codes are read by a separate launch, for decoding needs other registers and tiles.
        """
        if self.scale is None:
            return (self.part,)
        return ("trainable", "frozen") if self.trainable.shape[0] else ("frozen",)

    def served(self, part: str) -> Stored:
        """Return what the launch of `part` reads; for "trainable" and "frozen" that tensor alone, as the first.

        Codes come in pairs: 8-bit ones as int16.
        """
        if part == "trainable":
            return self._replace(frozen=None, scale=None)
        if part == "frozen":
            assert self.frozen is not None
            pairs = self.frozen.view(torch.int16) if self.frozen.dtype == torch.int8 else self.frozen
            return self._replace(trainable=pairs, frozen=None)
        return self

    @property
    def bits(self) -> int:
        """Bits of a code in what `served` gave; 0 = plain numbers."""
        if self.scale is None:
            return 0
        return 8 if self.trainable.dtype == torch.int16 else 4

    @property
    def share(self) -> int:
        """Columns of what `served` gave that share a scale; 1 = plain numbers."""
        return self.trainable.shape[-1] * 2 // self.scale.shape[-1] if self.scale is not None else 1

    @property
    def slots(self) -> int:
        """How many matrices there are."""
        return self.trainable.shape[0] + (0 if self.frozen is None else self.frozen.shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(t.nbytes for t in (self.trainable, self.frozen, self.scale) if t is not None)

    def split(self, halves: int) -> Stored:
        """View the same memory with each slot's N rows as `halves` matrices of N / halves rows, one after the other."""

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


def matrix_arguments(
    w: Stored, bias: Stored | None, part: str, block: tuple[int, int] | None, halves: int = 1
) -> dict[str, Any]:
    """Return what a launch of `part` gets for its matrix: tensors, where they begin, how to decode them.

    With `block` w comes by descriptors of such blocks. Slots have `halves` matrices each, see `Stored.split`.
    """
    served = w.served(part)
    by_tensor = served.pointers("w") if block is None else served.descriptors("w", block, halves)
    biases = {"bias": None, "bias_frozen": None} if bias is None else bias.served(part).pointers("bias")
    where = {"bases": w.base_of_slot_B, "trainable": w.trainable.shape[0] // halves, "PART": part}
    return {**by_tensor, **biases, **where, "scale": served.scale, "BITS": served.bits, "SHARE": served.share}


def term_arguments(term: RankTerm | None) -> dict[str, Any]:
    """Return a term's kernel arguments: RANK 0 without one; CHUNK is how much of the rank one product takes."""
    if term is None:
        none = dict.fromkeys(("rank_rows", "factor", "adapter_scale"), None)
        return {**none, "adapters": 0, "RANK": 0, "CHUNK": 16}
    rank = term.rows_Rr.shape[1]
    tensors = {"rank_rows": term.rows_Rr, "factor": term.factor, "adapter_scale": term.scale_B}
    chunk = min(64, max(16, power_of_2(rank)))
    return {**tensors, "adapters": term.factor.shape[0], "RANK": rank, "CHUNK": chunk}


def decoding_tile(tile: Tile, served: Stored, *, transposed: bool = False) -> Tile:
    """Return the tile of a launch that reads `served`; for codes a large block is halved: decoding takes registers.

    Along the axis of the codes, n if `transposed` and k otherwise, a block meets whole groups or lies within one.
    """
    if served.bits == 0:
        return tile
    n, k, share = tile.n // 2 if tile.m >= 64 else tile.n, tile.k, served.share
    if transposed:
        return replace(tile, n=n if n % share == 0 else math.gcd(n, share), k=min(k, 64))
    return replace(tile, n=n, k=k if k % share == 0 else math.gcd(k, share), split=max(1, tile.split // 2))


def describable(tensor: Tensor) -> bool:
    """Tell whether a tensor descriptor of a contiguous tensor can exist: base and rows at multiples of 16 bytes."""
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
