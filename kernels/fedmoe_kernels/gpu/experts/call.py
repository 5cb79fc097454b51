"""One call on a GPU as its steps see it: inputs, tiles, schedule, and the operands that several steps share.

Shapes as in `driver`: R = T * K places of which the first N are rows, H hidden, I intermediate, F = 2 * I for gated
activations and I for the others, r rank.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fedmoe_kernels.activations import is_gated
from fedmoe_kernels.backends import WORTH_SAYING, warn_once
from fedmoe_kernels.experts.op_inputs import WEIGHTS, OpInputs
from fedmoe_kernels.gpu.experts.decode import Codes
from fedmoe_kernels.gpu.experts.down import rank_product
from fedmoe_kernels.gpu.experts.memory import decodes, slots_at_once
from fedmoe_kernels.gpu.experts.schedule import Schedule, schedule
from fedmoe_kernels.gpu.experts.storage import Direct, RankTerm, RowIndex, Stored
from fedmoe_kernels.gpu.experts.up import up
from fedmoe_kernels.gpu.launch import Execute, Launch, start
from fedmoe_kernels.gpu.routing.place import inverse
from fedmoe_kernels.tiles.lookup import OVERRIDE, TileSet, arch_of, tiles_for


class CallOptions(NamedTuple):
    """How a call is made, besides its tensors: as `driver.forward` takes it."""

    activation: str
    frozen_format: str
    rows_per_slot: int
    arch: str | None
    execute: Execute


class Call(NamedTuple):
    """What every step of one call needs; `decodes` = frozen slots in codes are decoded before their products."""

    inputs: OpInputs
    row_index: RowIndex
    activation: str
    tiles: TileSet
    schedule: Schedule
    execute: Execute
    frozen_format: str = ""
    decodes: bool = False

    def run(self, launches: Iterable[Launch]) -> None:
        """Execute them in their order."""
        start(launches, self.execute)

    def rows(self, width: int) -> Tensor:
        """Return room (R, width) of x's dtype; rows from N on are never written."""
        return self.inputs.x_TH.new_empty(self.inputs.rows_TK.numel(), width)

    @property
    def w_in(self) -> Stored:
        """(B, F, H), both parts."""
        i = self.inputs
        return self._matrices(i.w_in, i.w_in_frozen, i.w_in_scale, i.w_in_whole)

    @property
    def w_out(self) -> Stored:
        """(B, H, I), both parts."""
        i = self.inputs
        return self._matrices(i.w_out, i.w_out_frozen, i.w_out_scale, i.w_out_whole)

    def _matrices(self, trainable: Tensor, frozen: Tensor | None, scale: Tensor | None, whole: Tensor | None) -> Stored:
        """Wrap both parts of a stack, with room to decode codes to where the call has many rows."""
        stored = _stored(trainable, frozen, self.inputs.base_of_slot_B)
        if stored.frozen is None or scale is None:
            return stored
        room = None
        if self.decodes:
            _, N, K = trainable.shape
            room = trainable.new_empty(slots_at_once(stored.frozen.shape[0], N * K * trainable.itemsize), N, K)
        return stored._replace(codes=Codes(self.frozen_format, scale, whole), room=room)

    @property
    def bias_in(self) -> Stored | None:
        """(B, F), both parts."""
        i = self.inputs
        return None if i.bias_in is None else _stored(i.bias_in, i.bias_in_frozen, i.base_of_slot_B)

    @property
    def bias_out(self) -> Stored | None:
        """(B, H), both parts."""
        i = self.inputs
        return None if i.bias_out is None else _stored(i.bias_out, i.bias_out_frozen, i.base_of_slot_B)

    def direct(self, weights_TK: Tensor | None) -> Direct | None:
        """Tell if tokens have one choice: the last product then writes in token order, and nothing is combined."""
        (tokens_R, places_R, _), rows_TK = self.row_index, self.inputs.rows_TK
        return Direct(tokens_R, places_R, weights_TK, rows_TK) if rows_TK.shape[1] == 1 else None

    def through(self, rows_XK: Tensor, factor: Tensor, *, transposed: bool, gather: bool) -> Tensor:
        """Compute (R, r): rows times an adapter's factor (Bl, r, K), or (Bl, K, r) if `transposed`."""
        out_Rr = self.rows(factor.shape[2 if transposed else 1])
        tokens_R = self.row_index.tokens_R if gather else None
        self.run(
            rank_product(
                *(rows_XK, factor, out_Rr),
                transposed=transposed,
                tokens_R=tokens_R,
                schedule=self.schedule,
                tile=self.tiles.rank,
            )
        )
        return out_Rr

    def term(self, rows_Rr: Tensor | None, factor: Tensor | None) -> RankTerm | None:
        """Return what adapters add to a product; None without adapters."""
        if rows_Rr is None or factor is None:
            return None
        assert self.inputs.scale_B is not None
        return RankTerm(rows_Rr, factor, self.inputs.scale_B)

    def first_product(self, z_RF: Tensor | None, h_RI: Tensor | None) -> None:
        """Compute z, f(z) or both, for the forward and for a backward that recomputes: one kernel, the same bits."""
        i = self.inputs
        xa_Rr = None if i.a_in is None else self.through(i.x_TH, i.a_in, transposed=False, gather=True)
        self.run(
            up(
                *(i.x_TH, self.row_index.tokens_R, self.w_in, self.bias_in),
                z_RF=z_RF,
                h_RI=h_RI,
                activation=self.activation,
                schedule=self.schedule,
                tile=self.tiles.up,
                term=self.term(xa_Rr, i.b_in),
            )
        )


def call_of(inputs: OpInputs, options: CallOptions) -> Call:
    """Choose the tiles and make the schedule."""
    activation, frozen_format, rows_per_slot, arch, execute = options
    inputs = OpInputs._make(
        tensor if tensor is None else aligned(tensor, name) for name, tensor in zip(inputs._fields, inputs, strict=True)
    )
    tiles = _tiles(
        inputs.x_TH.device,
        inputs.x_TH.dtype,
        *(inputs.x_TH.shape[1], inputs.w_out.shape[2]),
        gated=is_gated(activation),
        rows_per_slot=rows_per_slot,
        arch=arch,
        override=os.environ.get(OVERRIDE),
    )
    made = schedule(inputs.offsets_B1, inputs.rows_TK.numel(), tiles.rows, execute)
    first = decodes(frozen_format, rows_per_slot)
    return Call(inputs, _row_index(inputs, execute), activation, tiles, made, execute, frozen_format, first)


def _row_index(inputs: OpInputs, execute: Execute) -> RowIndex:
    """Where the rows come from: as given, or made again from `rows_TK`, in one launch."""
    tokens_R, places_R, rows_TK = inputs.tokens_R, inputs.places_R, inputs.rows_TK
    if tokens_R is None or places_R is None:
        tokens_R, places_R = (rows_TK.new_empty(rows_TK.numel()) for _ in range(2))
        start(inverse(rows_TK, tokens_R=tokens_R, places_R=places_R), execute)
    return RowIndex(tokens_R, places_R, inputs.weights_TK)


@lru_cache(maxsize=256)
def _tiles(
    device: torch.device,
    dtype: torch.dtype,
    hidden: int,
    inner: int,
    *,
    gated: bool,
    rows_per_slot: int,
    arch: str | None,
    override: str | None,
) -> TileSet:
    """`lookup.tiles_for`, remembered: it costs as much as two launches. `override` is in the key alone."""
    return tiles_for(
        arch_of(device) if arch is None else arch,
        dtype,
        rows_per_slot,
        hidden=hidden,
        inner=inner,
        gated=gated,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    )


def aligned(tensor: Tensor, name: str = "") -> Tensor:
    """Return the tensor, contiguous; copied if it starts off 16 bytes: no descriptor or wide load could read it.

    Of weights that are copied so, which is at every call, one warning tells `name`.
    """
    tensor = tensor.contiguous()
    if tensor.data_ptr() % 16 == 0:
        return tensor
    if name in WEIGHTS and tensor.nbytes >= WORTH_SAYING:
        warn_once(
            f"{name} starts {tensor.data_ptr() % 16} bytes past a multiple of 16, and its {tensor.nbytes} bytes are "
            "copied at every call; let it start at one"
        )
    return tensor.clone()


def _stored(trainable: Tensor, frozen: Tensor | None, base_of_slot_B: Tensor | None) -> Stored:
    """Wrap both parts of a stack; an empty frozen part becomes None."""
    return Stored(trainable, None if frozen is None or frozen.shape[0] == 0 else frozen, None, base_of_slot_B)
