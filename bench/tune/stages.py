"""One family of kernels at one tile: its operands, its launches, and what they leave behind."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench.common.cases import Shape
from fedmoe_kernels.activations import is_gated
from fedmoe_kernels.gpu.experts.data_gradient import column_blocks, data_gradient
from fedmoe_kernels.gpu.experts.down import down, input_gradient, rank_product
from fedmoe_kernels.gpu.experts.schedule import schedule
from fedmoe_kernels.gpu.experts.storage import RowIndex, Stored
from fedmoe_kernels.gpu.experts.up import up
from fedmoe_kernels.gpu.experts.weight_gradient import output_blocks, weight_gradient
from fedmoe_kernels.gpu.launch import Execute, Launch
from fedmoe_kernels.tiles.tile import Tile

RANK = 16


@dataclass(frozen=True)
class Layer:
    """The operands of every family for one shape: T tokens with K choices over B slots, drawn uniformly.

    Every slot is trainable, in one tensor: what a tile is good for does not depend on which of two tensors it reads.
    """

    shape: Shape
    x_TH: Tensor
    tokens_R: Tensor
    places_R: Tensor
    weights_TK: Tensor
    offsets_B1: Tensor
    w_in: Tensor
    w_out: Tensor
    bias_in: Tensor | None
    bias_out: Tensor | None
    a_in: Tensor
    z_RF: Tensor
    h_RI: Tensor

    def rows(self, *width: int, dtype: torch.dtype | None = None) -> Tensor:
        """Make an output by row, full of NaN so that what is not written shows."""
        size = (self.tokens_R.shape[0], *width)
        return torch.full(size, float("nan"), dtype=dtype or self.x_TH.dtype, device=self.x_TH.device)


def layer_of(shape: Shape, dtype: torch.dtype, device: str) -> Layer:
    """Draw the operands on `device`; on "meta" they have no values."""
    T, H, I, B, K = shape.sizes  # noqa: E741
    R, F = T * K, shape.F
    torch.manual_seed(0)

    def randn(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*size, dtype=torch.float32, device=device).mul_(scale).to(dtype)

    choice_TK = torch.rand(T, B, device=device).topk(K).indices
    order_R = choice_TK.flatten().argsort(stable=True)
    counts_B = torch.zeros(B, dtype=torch.int64, device=device).scatter_add_(
        0, choice_TK.flatten(), torch.ones(R, dtype=torch.int64, device=device)
    )
    return Layer(
        shape=shape,
        x_TH=randn(T, H),
        tokens_R=order_R // K,
        places_R=order_R,
        weights_TK=torch.rand(T, K, device=device).softmax(-1),
        offsets_B1=torch.cat([torch.zeros(1, dtype=torch.int64, device=device), counts_B.cumsum(0)]),
        w_in=randn(B, F, H, scale=H**-0.5),
        w_out=randn(B, H, I, scale=I**-0.5),
        bias_in=randn(B, F) if shape.bias else None,
        bias_out=randn(B, H) if shape.bias else None,
        a_in=randn(B, RANK, H, scale=H**-0.5),
        z_RF=randn(R, F),
        h_RI=randn(R, I),
    )


def stage(layer: Layer, family: str, tile: Tile, execute: Execute = Launch.run) -> dict[str, Tensor]:
    """Run the launches of one family at `tile` and return what they wrote; `execute` sees each product's launch.

    The weight gradient is that of w_in, the larger of the two.
    """
    shape, x_TH = layer.shape, layer.x_TH
    B, H = shape.E, shape.H
    if family == "weight_gradient":
        size, blocks = (B, shape.F, H), output_blocks(shape.F, H, tile)
        out = {
            "dw": torch.full(size, float("nan"), dtype=x_TH.dtype, device=x_TH.device),
            "squares": torch.full((B, blocks), float("nan"), dtype=torch.float32, device=x_TH.device),
        }
        how: dict[str, Any] = {"offsets_B1": layer.offsets_B1, "right_tokens": layer.tokens_R, "tile": tile}
        found = weight_gradient(layer.z_RF, x_TH, out["dw"], squares_GN=out["squares"], **how)
    else:
        plan = schedule(layer.offsets_B1, layer.tokens_R.shape[0], tile.m, _schedules(x_TH))
        found, out = _over_rows(layer, family, {"schedule": plan, "tile": tile})
    for launch in found:
        execute(launch)
    if "squares" in out:  # their number depends on the tile, their sum does not
        out["squares"] = out["squares"].sum(1)
    if "zdz" in out:
        del out["zdz"], out["ds"]
    return out


def _schedules(x_TH: Tensor) -> Execute:
    return (lambda launch: None) if x_TH.device.type == "meta" else Launch.run


def _over_rows(layer: Layer, family: str, how: dict[str, Any]) -> tuple[list[Launch], dict[str, Tensor]]:
    shape, x_TH, tile = layer.shape, layer.x_TH, how["tile"]
    F, H, I = shape.F, shape.H, shape.I  # noqa: E741
    w_in, w_out = Stored(layer.w_in), Stored(layer.w_out)
    bias_in, bias_out = (None if b is None else Stored(b) for b in (layer.bias_in, layer.bias_out))
    if family == "up":
        out = {"z": layer.rows(F), "h": layer.rows(I)}
        how |= {"z_RF": out["z"], "h_RI": out["h"], "activation": shape.activation}
        return up(x_TH, layer.tokens_R, w_in, bias_in, **how), out
    if family == "down":
        out = {"out": layer.rows(H)}
        return down(layer.h_RI, w_out, bias_out, out["out"], **how), out
    if family == "input_gradient":
        out = {"out": layer.rows(H)}
        return input_gradient(layer.z_RF, w_in, out["out"], **how), out
    if family == "rank":
        out = {"out": layer.rows(RANK)}
        how |= {"transposed": False, "tokens_R": layer.tokens_R}
        return rank_product(x_TH, layer.a_in, out["out"], **how), out
    assert family == "data_gradient", family
    blocks = column_blocks(I, tile, w_out)
    out = {"dz": layer.rows(F), "sh": layer.rows(I), "ds": layer.rows(blocks, dtype=torch.float32)}
    out["zdz"] = torch.empty(how["schedule"].tiles, blocks, dtype=torch.float32, device=x_TH.device)
    index = RowIndex(layer.tokens_R, layer.places_R, layer.weights_TK)
    how |= {"dz_RF": out["dz"], "sh_RI": out["sh"], "ds_RC": out["ds"], "zdz_MC": out["zdz"]}
    return data_gradient(x_TH, layer.z_RF, index, w_out, activation=shape.activation, **how), out


def scaled(shape: Shape, rows_per_slot: int) -> Shape:
    """Return the shape with as many tokens as give every expert this many rows on average."""
    return replace(shape, T=max(1, rows_per_slot * shape.E // shape.K))


def gated(shape: Shape) -> bool:
    """Tell whether its up-projection has two halves."""
    return is_gated(shape.activation)
