"""The experts on a GPU: which kernels run in which order, what is allocated for them and when it is let go.

Shapes: T tokens, K top-k, B slots, Bt trainable slots, Bl slots with an adapter, R = T * K places of which the first N
are rows, H hidden, I intermediate, F = 2 * I for gated activations and I for the others, r rank.

Nothing here reads a value from the device or depends on one, so a CUDA graph can hold a call, and with
`execute=list.append` on tensors of the meta device the launches can be looked at, or compiled, where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from fedmoe_kernels.configs import TileSet, tiles_for
from fedmoe_kernels.gpu.combine import combine
from fedmoe_kernels.gpu.down import down, rank_product
from fedmoe_kernels.gpu.launch import Execute, Launch
from fedmoe_kernels.gpu.schedule import Schedule, schedule
from fedmoe_kernels.gpu.storage import Direct, RankTerm, Stored
from fedmoe_kernels.gpu.up import up
from fedmoe_kernels.ops import OpInputs


class _Stage(NamedTuple):
    """What every step of one call needs."""

    inputs: OpInputs
    activation: str
    tiles: TileSet
    schedule: Schedule
    execute: Execute

    def run(self, launches: Iterable[Launch]) -> None:
        for launch in launches:
            self.execute(launch)

    def rows(self, width: int) -> Tensor:
        """(R, width) of x's dtype; rows from N on are never written."""
        return self.inputs.x_TH.new_empty(self.inputs.tokens_R.shape[0], width)

    @property
    def w_in(self) -> Stored:
        i = self.inputs
        return _stored(i.w_in, i.w_in_frozen, i.w_in_scale, i.base_of_slot_B)

    @property
    def w_out(self) -> Stored:
        i = self.inputs
        return _stored(i.w_out, i.w_out_frozen, i.w_out_scale, i.base_of_slot_B)

    @property
    def bias_in(self) -> Stored | None:
        i = self.inputs
        return None if i.bias_in is None else _stored(i.bias_in, i.bias_in_frozen, None, i.base_of_slot_B)

    @property
    def bias_out(self) -> Stored | None:
        i = self.inputs
        return None if i.bias_out is None else _stored(i.bias_out, i.bias_out_frozen, None, i.base_of_slot_B)

    def direct(self, weights_TK: Tensor | None) -> Direct | None:
        """With one choice a token the last product writes to token order, and nothing is combined."""
        i = self.inputs
        return Direct(i.tokens_R, i.places_R, weights_TK, i.rows_TK) if i.rows_TK.shape[1] == 1 else None

    def through(self, rows_XK: Tensor, factor: Tensor, *, transposed: bool, gather: bool) -> Tensor:
        """(R, r): rows times an adapter's factor (Bl, r, K), or (Bl, K, r) if `transposed`."""
        out_Rr = self.rows(factor.shape[2 if transposed else 1])
        tokens_R = self.inputs.tokens_R if gather else None
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
        if rows_Rr is None or factor is None:
            return None
        assert self.inputs.scale_B is not None
        return RankTerm(rows_Rr, factor, self.inputs.scale_B)


def forward(
    inputs: OpInputs,
    *,
    activation: str,
    keep_z: bool,
    rows_per_slot: int,
    arch: str,
    execute: Execute = Launch.run,
) -> tuple[Tensor, Tensor]:
    """y (T, H) and the pre-activations z (R, F) that the backward reads; z is (0, F) without `keep_z`.

    Args:
        inputs: as the operator takes them.
        activation: a name of `activations.ACTIVATIONS`.
        keep_z: whether z is stored.
        rows_per_slot: what the tiles are chosen by, never a count of this call in a cohort.
        arch: the key of the tile tables, see `configs.tiles_for`.
        execute: what becomes of each launch.
    """
    stage = _stage(inputs, activation, rows_per_slot, arch, execute)
    inputs = stage.inputs
    (T, H), (_, F) = inputs.x_TH.shape, inputs.w_in.shape[:2]
    z_RF = stage.rows(F) if keep_z else inputs.x_TH.new_empty(0, F)
    h_RI = stage.rows(inputs.w_out.shape[2])
    _first_product(stage, z_RF if keep_z else None, h_RI)
    ha_Rr = None if inputs.a_out is None else stage.through(h_RI, inputs.a_out, transposed=False, gather=False)
    direct = stage.direct(inputs.weights_TK)
    out_XH = stage.rows(H) if direct is None else inputs.x_TH.new_empty(T, H)
    stage.run(
        down(
            *(h_RI, stage.w_out, stage.bias_out, out_XH),
            schedule=stage.schedule,
            tile=stage.tiles.down,
            direct=direct,
            term=stage.term(ha_Rr, inputs.b_out),
        )
    )
    del h_RI, ha_Rr
    if direct is not None:
        return out_XH, z_RF
    y_TH = inputs.x_TH.new_empty(T, H)
    stage.run(combine(out_XH, inputs.rows_TK, inputs.weights_TK, y_TH))
    return y_TH, z_RF


def _first_product(stage: _Stage, z_RF: Tensor | None, h_RI: Tensor | None) -> None:
    """z, f(z) or both, as the forward and a backward that recomputes make them: by one kernel, with the same bits."""
    i = stage.inputs
    xa_Rr = None if i.a_in is None else stage.through(i.x_TH, i.a_in, transposed=False, gather=True)
    stage.run(
        up(
            *(i.x_TH, i.tokens_R, stage.w_in, stage.bias_in),
            z_RF=z_RF,
            h_RI=h_RI,
            activation=stage.activation,
            schedule=stage.schedule,
            tile=stage.tiles.up,
            term=stage.term(xa_Rr, i.b_in),
        )
    )


def _stage(inputs: OpInputs, activation: str, rows_per_slot: int, arch: str, execute: Execute) -> _Stage:
    inputs = inputs._replace(**{name: _aligned(t) for name, t in inputs._asdict().items() if t is not None})
    tiles = tiles_for(arch, inputs.x_TH.dtype, rows_per_slot)
    made = schedule(inputs.offsets_B1, inputs.tokens_R.shape[0], tiles.rows, execute)
    return _Stage(inputs, activation, tiles, made, execute)


def _aligned(tensor: Tensor) -> Tensor:
    """Itself, or a copy where it starts between two multiples of 16 bytes, which no descriptor or wide load can."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _stored(trainable: Tensor, frozen: Tensor | None, scale: Tensor | None, base_of_slot_B: Tensor | None) -> Stored:
    """An empty frozen part is none."""
    if frozen is not None and frozen.shape[0] == 0:
        frozen, scale = None, None
    return Stored(trainable, frozen, scale, base_of_slot_B)
