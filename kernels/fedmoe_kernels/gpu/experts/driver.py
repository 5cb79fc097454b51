"""The experts on a GPU: which kernels run in which order, what is allocated for them and when it is freed.

Shapes: T tokens, K top-k, B slots, Bt trainable slots, Bl slots with an adapter, R = T * K places of which the first N
are rows, H hidden, I intermediate, F = 2 * I for gated activations and I for the others, r rank.

Nothing here reads a value from the device or depends on one, so a CUDA graph can hold a call. With
`execute=list.append` on tensors of the meta device the launches can be looked at, or compiled, where there is no GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fedmoe_kernels.experts.op_inputs import DIFFERENTIABLE, OpInputs
from fedmoe_kernels.gpu.experts.call import Call, CallOptions, aligned, call_of
from fedmoe_kernels.gpu.experts.combine import combine
from fedmoe_kernels.gpu.experts.data_gradient import column_blocks, data_gradient
from fedmoe_kernels.gpu.experts.down import down, input_gradient
from fedmoe_kernels.gpu.experts.row_sums import output_norms, routing_gradient, score_sums, tile_pieces
from fedmoe_kernels.gpu.experts.weight_gradient import bias_gradient, output_blocks, weight_gradient
from fedmoe_kernels.gpu.launch import Execute, Launch

_FACTORS = ("a_in", "b_in", "a_out", "b_out")


def forward(
    inputs: OpInputs,
    *,
    activation: str,
    keep_z: bool,
    rows_per_slot: int,
    want_reap: bool = False,
    frozen_format: str = "",
    arch: str | None = None,
    execute: Execute = Launch.run,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute y (T, H), the pre-activations z (R, F) that the backward reads, and each slot's REAP sum, float32 (B,).

    z is (0, F) without `keep_z`, and the sums (0,) without `want_reap`.

    Args:
        inputs: as the operator takes them.
        activation: a name of `activations.ACTIVATIONS`.
        keep_z: whether z is stored.
        rows_per_slot: what the tiles are chosen by, and whether codes are decoded first; never a count of this call in
            a cohort.
        want_reap: whether the norms of the experts' outputs are summed, of the rows that the last product has stored.
        frozen_format: a name of `formats.FORMATS`; "" where no weight is stored in codes.
        arch: the key of the tile tables, see `lookup.tiles_for`; None = that of the device.
        execute: what becomes of each launch.
    """
    call = call_of(inputs, CallOptions(activation, frozen_format, rows_per_slot, arch, execute))
    inputs = call.inputs
    (T, H), (_, F) = inputs.x_TH.shape, inputs.w_in.shape[:2]
    z_RF = call.rows(F) if keep_z else inputs.x_TH.new_empty(0, F)
    h_RI = call.rows(inputs.w_out.shape[2])
    call.first_product(z_RF if keep_z else None, h_RI)
    ha_Rr = None if inputs.a_out is None else call.through(h_RI, inputs.a_out, transposed=False, gather=False)
    direct = call.direct(inputs.weights_TK)
    out_XH = call.rows(H) if direct is None else inputs.x_TH.new_empty(T, H)
    call.run(
        down(
            *(h_RI, call.w_out, call.bias_out, out_XH),
            schedule=call.schedule,
            tile=call.tiles.down,
            direct=direct,
            term=call.term(ha_Rr, inputs.b_out),
        )
    )
    del h_RI, ha_Rr
    reap_B = _reap(call, out_XH, by_token=direct is not None) if want_reap else _no_sums(inputs)
    if direct is not None:
        return out_XH, z_RF, reap_B
    y_TH = inputs.x_TH.new_empty(T, H)
    call.run(combine(out_XH, inputs.rows_TK, inputs.weights_TK, y_TH))
    return y_TH, z_RF, reap_B


def backward(
    dy_TH: Tensor,
    z_RF: Tensor,
    inputs: OpInputs,
    *,
    activation: str,
    needs: list[bool],
    rows_per_slot: int,
    frozen_format: str = "",
    arch: str | None = None,
    execute: Execute = Launch.run,
) -> tuple[Tensor, ...]:
    """Compute the gradients that `needs` asks for in the order of `DIFFERENTIABLE`, then the scores; (0,) for others.

    The order keeps the peak low. What comes from s * h is first, so that it is gone before dx is made; dW_in is last,
    when all that is left by row is dz.

    Args:
        dy_TH: gradient of y, contiguous.
        z_RF: as `forward` returned it; of no rows, z is made again from x.
        inputs, activation, rows_per_slot, frozen_format, arch, execute: as in `forward`.
        needs: one for each output.
    """
    asked = dict(zip((*DIFFERENTIABLE, "scores_B6"), needs, strict=True))
    # A stack without trainable slots is differentiable all the same; nothing need be computed for it.
    need = {name: want and not _empty_stack(inputs, name) for name, want in asked.items()}
    call = call_of(inputs, CallOptions(activation, frozen_format, rows_per_slot, arch, execute))
    work = _Backward(call, aligned(dy_TH), need, _squares(call, need))
    found: dict[str, Tensor] = {}
    i, adapters = call.inputs, need["a_in"]
    dyb_Rr = None
    if i.b_out is not None:
        dyb_Rr = call.through(work.dy_TH, i.b_out, transposed=True, gather=True)
    dz_RF, sh_RI, partial = work.send_back(z_RF, dyb_Rr)
    if need["weights_TK"] or need["scores_B6"]:
        found["weights_TK"], sums_S4 = work.routing(*partial)
    del partial
    if need["w_out"]:
        found["w_out"] = work.weight("w_out", (work.dy_TH, call.row_index.tokens_R), (sh_RI, None))
    if need["bias_out"]:
        found["bias_out"] = work.bias("bias_out", work.dy_TH, weighted=True)
    if adapters:
        assert i.a_out is not None
        assert sh_RI is not None
        sha_Rr = call.through(sh_RI, i.a_out, transposed=False, gather=False)
        found["b_out"] = work.weight("b_out", (work.dy_TH, call.row_index.tokens_R), (sha_Rr, None))
        del sha_Rr
        found["a_out"] = work.weight("a_out", (dyb_Rr, None), (sh_RI, None))
    del sh_RI, dyb_Rr
    dzb_Rr = None
    if i.b_in is not None and dz_RF is not None and (adapters or need["x_TH"]):
        dzb_Rr = call.through(dz_RF, i.b_in, transposed=True, gather=False)
    if need["x_TH"]:
        found["x_TH"] = work.input_gradient(dz_RF, dzb_Rr)
    if need["w_in"]:
        found["w_in"] = work.weight("w_in", (dz_RF, None), (i.x_TH, call.row_index.tokens_R))
    if need["bias_in"]:
        found["bias_in"] = work.bias("bias_in", dz_RF, weighted=False)
    if adapters:
        assert i.a_in is not None
        xa_Rr = call.through(i.x_TH, i.a_in, transposed=False, gather=True)
        found["b_in"] = work.weight("b_in", (dz_RF, None), (xa_Rr, None))
        found["a_in"] = work.weight("a_in", (dzb_Rr, None), (i.x_TH, call.row_index.tokens_R))
    if need["scores_B6"]:
        found["scores_B6"] = i.x_TH.new_empty(i.offsets_B1.shape[0] - 1, 6, dtype=torch.float32)
        squares_GN = None if work.squares is None else work.squares.whole_GN
        call.run(score_sums(sums_S4, i.offsets_B1, found["scores_B6"], schedule=call.schedule, squares_GN=squares_GN))
    empty = {name: torch.empty_like(getattr(i, name)) for name in asked if asked[name] and not need[name]}
    return tuple((found | empty)[name] if want else i.x_TH.new_empty(0) for name, want in asked.items())


def _no_sums(inputs: OpInputs) -> Tensor:
    return inputs.x_TH.new_empty(0, dtype=torch.float32)


def _reap(call: Call, out_XH: Tensor, *, by_token: bool) -> Tensor:
    """Sum the norms of what each slot's rows add to their tokens, (B,); rows `by_token` are weighted already."""
    reap_B = out_XH.new_empty(call.inputs.offsets_B1.shape[0] - 1, dtype=torch.float32)
    sums_S = out_XH.new_empty(tile_pieces(call.schedule), dtype=torch.float32)
    call.run(output_norms(out_XH, call.row_index, sums_S, reap_B, schedule=call.schedule, by_token=by_token))
    return reap_B


def _empty_stack(inputs: OpInputs, name: str) -> bool:
    """Whether the stack is one of no trainable slots."""
    return name in ("w_in", "w_out", "bias_in", "bias_out") and getattr(inputs, name).shape[0] == 0


class _Squares(NamedTuple):
    """Where the weight gradients leave the squared norms of their blocks: views of one (G, N), by matrix."""

    whole_GN: Tensor
    parts: dict[str, Tensor]


class _Backward(NamedTuple):
    """What every step of a backward needs."""

    call: Call
    dy_TH: Tensor
    need: dict[str, bool]
    squares: _Squares | None

    def send_back(
        self, z_RF: Tensor, dyb_Rr: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, tuple[Tensor | None, Tensor | None]]:
        """Compute dz, s * h and the partial sums of <d, h> and <z, dz>, each None where nothing asks for it."""
        call, need, i = self.call, self.need, self.call.inputs
        learns = need["a_in"]
        want_dz = learns or need["x_TH"] or need["w_in"] or need["bias_in"]
        want_sh = learns or need["w_out"]
        want_ds = need["weights_TK"] or need["scores_B6"]
        if not (want_dz or want_sh or want_ds):
            return None, None, (None, None)
        R, F, inner = i.rows_TK.numel(), i.w_in.shape[1], i.w_out.shape[2]
        if z_RF.shape[0] < R:
            z_RF = call.rows(F)
            call.first_product(z_RF, None)
        dz_RF = call.rows(F) if want_dz else None
        sh_RI = call.rows(inner) if want_sh else None
        w_out = call.w_out
        columns = column_blocks(inner, call.tiles.data_gradient, w_out)
        ds_RC = i.x_TH.new_empty(R, columns, dtype=torch.float32) if want_ds else None
        zdz_MC = None
        if need["scores_B6"]:
            zdz_MC = i.x_TH.new_empty(call.schedule.tiles, columns, dtype=torch.float32)
        call.run(
            data_gradient(
                *(self.dy_TH, z_RF, call.row_index, w_out),
                dz_RF=dz_RF,
                sh_RI=sh_RI,
                ds_RC=ds_RC,
                zdz_MC=zdz_MC,
                activation=call.activation,
                schedule=call.schedule,
                tile=call.tiles.data_gradient,
                term=call.term(dyb_Rr, i.a_out),
            )
        )
        return dz_RF, sh_RI, (ds_RC, zdz_MC)

    def routing(self, ds_RC: Tensor | None, zdz_MC: Tensor | None) -> tuple[Tensor, Tensor]:
        """Compute dS by place, and the importance sums by piece of a tile; (0,) where nothing asks for them."""
        call, i = self.call, self.call.inputs
        assert ds_RC is not None
        out_TK = torch.empty_like(i.weights_TK) if self.need["weights_TK"] else None
        sums_S4 = None
        if self.need["scores_B6"]:
            sums_S4 = i.x_TH.new_empty(tile_pieces(call.schedule), 4, dtype=torch.float32)
        call.run(
            routing_gradient(
                *(ds_RC, call.row_index, i.rows_TK, out_TK),
                schedule=call.schedule,
                dy_TH=self.dy_TH,
                bias_out=call.bias_out,
                zdz_MC=zdz_MC,
                sums_S4=sums_S4,
            )
        )
        nothing = i.x_TH.new_empty(0)
        return nothing if out_TK is None else out_TK, nothing if sums_S4 is None else sums_S4

    def weight(
        self, name: str, left: tuple[Tensor | None, Tensor | None], right: tuple[Tensor | None, Tensor | None]
    ) -> Tensor:
        """Compute the gradient of a matrix from two operands, each with the tokens that it is read by or None."""
        i = self.call.inputs
        out_GPQ = torch.empty_like(getattr(i, name))
        assert left[0] is not None
        assert right[0] is not None
        self.call.run(
            weight_gradient(
                *(left[0], right[0], out_GPQ),
                offsets_B1=i.offsets_B1,
                left_tokens=left[1],
                right_tokens=right[1],
                tile=self.call.tiles.weight_gradient,
                learns_B=i.trainable_B,
                scale_B=i.scale_B if name in _FACTORS else None,
                squares_GN=None if self.squares is None else self.squares.parts[name],
            )
        )
        return out_GPQ

    def bias(self, name: str, rows_XN: Tensor | None, *, weighted: bool) -> Tensor:
        """Compute a bias gradient: the sum of each slot's rows, of dy by token and `weighted`, or of dz by row."""
        i = self.call.inputs
        out_GN = torch.empty_like(getattr(i, name))
        assert rows_XN is not None
        index = self.call.row_index if weighted else None
        self.call.run(bias_gradient(rows_XN, out_GN, offsets_B1=i.offsets_B1, routing=index, learns_B=i.trainable_B))
        return out_GN

    def input_gradient(self, dz_RF: Tensor | None, dzb_Rr: Tensor | None) -> Tensor:
        """Compute dx (T, H): each token's sum of dz @ w_in over its rows."""
        call, i = self.call, self.call.inputs
        assert dz_RF is not None
        direct = call.direct(None)
        out_XH = torch.empty_like(i.x_TH) if direct is not None else call.rows(i.x_TH.shape[1])
        call.run(
            input_gradient(
                *(dz_RF, call.w_in, out_XH),
                schedule=call.schedule,
                tile=call.tiles.input_gradient,
                direct=direct,
                term=call.term(dzb_Rr, i.a_in),
            )
        )
        if direct is not None:
            return out_XH
        dx_TH = torch.empty_like(i.x_TH)
        call.run(combine(out_XH, i.rows_TK, None, dx_TH))
        return dx_TH


def _squares(call: Call, need: dict[str, bool]) -> _Squares | None:
    """Room for the squared norms of all weight gradients that will be computed; None where nothing asks."""
    i = call.inputs
    learned = {name: getattr(i, name) for name in ("w_in", "w_out", *_FACTORS) if need[name]}
    if not need["scores_B6"] or not learned:
        return None
    tile = call.tiles.weight_gradient
    widths = [output_blocks(t.shape[1], t.shape[2], tile) for t in learned.values()]
    slots = next(iter(learned.values())).shape[0]
    whole_GN = i.x_TH.new_empty(slots, sum(widths), dtype=torch.float32)
    return _Squares(whole_GN, dict(zip(learned, whole_GN.split(widths, dim=1), strict=True)))
