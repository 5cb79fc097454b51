"""How the kernels see one stacked matrix, the frozen slots in a second tensor, and the launches of a product with it.

Shapes: B slots, Bt trainable slots, N x K one slot's matrix as it is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedmoe_kernels.gpu.experts.decode import PLAIN, Codes, decode, in_pairs, within
from fedmoe_kernels.gpu.launch import Launch, TensorDescriptor, cdiv, power_of_2, row_constants
from fedmoe_kernels.tiles.lookup import Tile


class Part(NamedTuple):
    """The slots that one launch of a product serves: rows `begin`..`stop` - 1 of both tensors laid end to end.

    Attributes:
        kind: what a kernel finds: "all" slots in w, "both" w and w_frozen to choose from, or "some", those in w alone.
        begin: the first slot of "some"; of "both", the first that lies in w_frozen.
        stop: the slot after the last.
        w: (stop - begin, N, K), or of "both" the trainable slots; codes by pairs where `codes` says how.
        w_frozen: of "both", the others.
        codes: how the codes in w are stored; None = plain numbers.
        base_of_slot_B: as in `Stored`.
        before: what has to run first.
    """

    kind: str
    begin: int
    stop: int
    w: Tensor
    w_frozen: Tensor | None = None
    codes: Codes | None = None
    base_of_slot_B: Tensor | None = None
    before: tuple[Launch, ...] = ()

    @property
    def _stacks(self) -> list[Tensor]:
        return [stack for stack in (self.w, self.w_frozen) if stack is not None and stack.shape[0]]

    @property
    def describable(self) -> bool:
        """Whether a kernel can read it by descriptor: plain numbers, rows and tensors at multiples of 16 bytes."""
        return self.codes is None and all(describable(stack) for stack in self._stacks)

    @property
    def slots(self) -> int:
        """How many matrices there are."""
        return sum(stack.shape[0] for stack in self._stacks)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        scales = 0 if self.codes is None else self.codes.scale.nbytes
        return scales + sum(stack.nbytes for stack in self._stacks)

    def arguments(self, block: tuple[int, int] | None, halves: int = 1) -> dict[str, Any]:
        """Return what a launch gets for its matrix: tensors, where they begin, how to decode them.

        With `block` w comes by descriptors of such blocks; a descriptor costs the host 15 us, so there is none for a
        stack that is not there. Slots have `halves` matrices each, of N / halves rows, one after the other.
        """
        w, w_frozen = (_apart(stack, halves) for stack in (self.w, self.w_frozen))
        tensors: dict[str, Any] = {"w": w, "w_frozen": w_frozen}
        if block is not None:
            made = [TensorDescriptor.from_tensor(_apart(stack, halves), [halves, *block]) for stack in self._stacks]
            tensors = {"w": made[0], "w_frozen": None if w_frozen is None else made[-1]}
        where = {"bases": self.base_of_slot_B, "begin": self.begin, "stop": self.stop, "PART": self.kind}
        return tensors | where | (PLAIN if self.codes is None else self.codes.arguments(self.w))

    def biases(self, bias: Stored | None, halves: int = 1) -> dict[str, Tensor | None]:
        """Return what a launch gets for the biases of its slots."""
        if bias is None:
            return {"bias": None, "bias_frozen": None}
        if self.kind == "both":
            return {"bias": _apart(bias.trainable, halves), "bias_frozen": _apart(bias.frozen, halves)}
        first = self.begin if self.kind == "some" else 0
        return {"bias": _apart(bias.some(first, self.stop), halves), "bias_frozen": None}


class Stored(NamedTuple):
    """One stacked matrix (or bias, without the last axis) of all slots.

    Attributes:
        trainable: (Bt, N, K); Bt may be 0.
        frozen: (B - Bt, N, K), codes of that shape or two in a byte where `codes` is given; None = every slot is in
            `trainable`.
        codes: how the frozen slots are stored; None = as the trainable ones.
        base_of_slot_B: (B,) int64, the row of the two tensors laid end to end that a slot runs; None = its own index.
        room: (slots at once, N, K) of the dtype of `trainable`, to decode frozen slots to before each product; None =
            products read codes.
    """

    trainable: Tensor
    frozen: Tensor | None = None
    codes: Codes | None = None
    base_of_slot_B: Tensor | None = None
    room: Tensor | None = None

    @property
    def slots(self) -> int:
        """How many matrices there are."""
        return self.trainable.shape[0] + (0 if self.frozen is None else self.frozen.shape[0])

    @property
    def parts(self) -> list[Part]:
        """The launches of a product with this matrix, each by the slots that it serves.

        One, except that codes are read by a launch of their own, for to decode needs other registers and tiles, and
        that frozen slots are decoded in pieces where not all of them have room at once.
        """
        learning, slots, bases = self.trainable.shape[0], self.slots, self.base_of_slot_B
        whole = Part(
            "all" if self.frozen is None else "both", learning, slots, self.trainable, self.frozen, None, bases
        )
        if self.frozen is None or self.codes is None:
            return [whole]
        frozen, room = slots - learning, self.room
        if room is not None and room.shape[0] == frozen:
            return [whole._replace(w_frozen=room, before=(decode(self.frozen, self.codes, room),))]
        parts = [Part("some", 0, learning, self.trainable, None, None, bases)] if learning else []
        if room is None:
            return [*parts, Part("some", learning, slots, in_pairs(self.frozen), None, self.codes, bases)]
        for first in range(0, frozen, room.shape[0]):
            stop = min(first + room.shape[0], frozen)
            some = room[: stop - first]
            before = decode(self.frozen[first:stop], self.codes.of(first, stop), some)
            parts.append(Part("some", learning + first, learning + stop, some, None, None, bases, (before,)))
        return parts

    def some(self, begin: int, stop: int) -> Tensor:
        """Return plain slots begin..stop - 1, all of which are trainable or all frozen."""
        learning = self.trainable.shape[0]
        if stop <= learning:
            return self.trainable[begin:stop]
        assert self.frozen is not None
        return self.frozen[begin - learning : stop - learning]


def _apart(stack: Tensor | None, halves: int) -> Tensor | None:
    """View a stack with each slot's N rows as `halves` matrices of N / halves rows, one after the other."""
    if stack is None or halves == 1:
        return stack
    slots, rows, *depth = stack.shape
    return stack.view(slots * halves, rows // halves, *depth)


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


def term_arguments(term: RankTerm | None) -> dict[str, Any]:
    """Return a term's kernel arguments: RANK 0 without one; CHUNK is how much of the rank one product takes."""
    if term is None:
        none = dict.fromkeys(("rank_rows", "factor", "adapter_scale"), None)
        return {**none, "adapters": 0, "RANK": 0, "CHUNK": 16}
    rank = term.rows_Rr.shape[1]
    tensors = {"rank_rows": term.rows_Rr, "factor": term.factor, "adapter_scale": term.scale_B}
    chunk = min(64, max(16, power_of_2(rank)))
    return {**tensors, "adapters": term.factor.shape[0], "RANK": rank, "CHUNK": chunk}


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


class Product(NamedTuple):
    """A product as its launches see it: (rows, depth) of `dtype` times a (columns, depth) of each of a slot's halves.

    `moved` are the bytes of rows, read and written; `transposed` says that the matrices are (depth, columns).
    """

    parts: Sequence[Part]
    rows: int
    columns: int
    depth: int
    dtype: torch.dtype
    moved: int
    transposed: bool = False
    halves: int = 1

    def launches(
        self, kernel: Any, tiles: int, tile: Tile, common: dict[str, Any], own: Callable[[Part, Tile], dict[str, Any]]
    ) -> list[Launch]:
        """Make the launches, each after what has to run before it: a program for each tile and block of columns.

        Args:
            kernel: what is launched.
            tiles: of rows.
            tile: sizes of the blocks, which each part cuts for itself.
            common: arguments of all launches.
            own: those that a part with its tile has besides.
        """
        found: list[Launch] = []
        slots = sum(part.slots for part in self.parts)
        for part in self.parts if tiles else ():
            cut = decoding_tile(tile, part, transposed=self.transposed)
            tma = cut.tma and part.describable
            block = (cut.k, cut.n) if self.transposed else (cut.n, cut.k)
            args = {
                **common,
                **part.arguments(block if tma else None, self.halves),
                **row_constants(cut, self.dtype, tma=tma),
                "steps": cdiv(self.depth, cut.k),
                **own(part, cut),
            }
            grid, share = (tiles * cdiv(self.columns, cut.n),), part.slots / slots
            flops = round(2 * self.rows * self.halves * self.columns * self.depth * share)
            cost = (flops, round(self.moved * share) + part.nbytes)
            found += (*part.before, Launch(kernel, grid, args, cut.warps, cut.stages, *cost, cut.registers))
        return found


def decoding_tile(tile: Tile, part: Part, *, transposed: bool = False) -> Tile:
    """Return the tile of a launch that reads `part`; for codes a large block is halved: decoding takes registers.

    Along the axis of the codes, n if `transposed` and k otherwise, a block meets whole groups or lies within one.
    """
    if part.codes is None:
        return tile
    n, k, share = tile.n // 2 if tile.m >= 64 else tile.n, tile.k, part.codes.share(part.w)
    if transposed:
        n = within(n, share)
        return replace(tile, n=n, k=min(k, 64), split=max(1, min(tile.split, n // 16)))
    return replace(tile, n=n, k=within(k, share), split=max(1, tile.split // 2))
