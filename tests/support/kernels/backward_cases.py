"""Routed rows with what the backward kernels read, poisoned where no row looks, and their gradients in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from forward_cases import normal, run, stored, unwritten
from torch import Tensor

from fedmoe_kernels import Routing, SlotMap, reference
from fedmoe_kernels.activations import width
from fedmoe_kernels.gpu.experts.data_gradient import column_blocks, data_gradient
from fedmoe_kernels.gpu.experts.schedule import Schedule, schedule
from fedmoe_kernels.gpu.experts.storage import RankTerm, RowIndex, Stored
from fedmoe_kernels.tiles.lookup import Tile

TILE = Tile(16, 16, 16, 1, 1, group=2, split=2)
HEIGHT = TILE.m


def choices(counts: Sequence[int], tokens: int, k: int, seed: int = 0) -> Tensor:
    """(T, K) slots, `counts[b]` places in slot b, no slot twice in a token where that can be, -1 in the other places.

    Tokens are filled round robin, so counts up to T are met without a repetition.
    """
    slots_TK = torch.full((tokens, k), -1)
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
    place = 0
    for slot, count in enumerate(counts):
        for _ in range(count):
            slots_TK[order[place % tokens], place // tokens] = slot
            place += 1
    return slots_TK


@dataclass(frozen=True, eq=False)
class Case:
    """Inputs of the backward in float32; NaN lies in unused tokens, in z past the last row and in unused matrices."""

    routing: Routing
    schedule: Schedule
    dy_TH: Tensor
    z_RF: Tensor
    w_out: Tensor  # (B, H, I)
    bias_out: Tensor  # (B, H)
    activation: str

    @property
    def count(self) -> int:
        """N."""
        return int(self.routing.offsets_B1[-1])

    @property
    def index(self) -> RowIndex:
        return RowIndex(self.routing.tokens_R, self.routing.places_R, self.routing.weights_TK)

    @property
    def slot_N(self) -> Tensor:
        return torch.repeat_interleave(torch.arange(self.routing.num_slots), self.routing.counts_B)

    @property
    def inner(self) -> int:
        """I."""
        return self.w_out.shape[2]


def case(
    slots_TK: Tensor, slots: int, H: int, inner: int, *, activation: str = "swiglu", height: int = HEIGHT, seed: int = 0
) -> Case:
    """O(1) data, some of it beyond the clamps of swiglu_oai."""
    T, K = slots_TK.shape
    s_TK = normal(T, K, seed=seed + 1)
    routing = Routing.from_topk(slots_TK, s_TK, SlotMap(torch.arange(slots), slots))
    F = width(activation, inner)
    dy, z = normal(T, H, seed=seed + 2), 4 * normal(T * K, F, seed=seed + 3)
    w_out, bias = normal(slots, H, inner, seed=seed + 4) / H**0.5, normal(slots, H, seed=seed + 5)
    unused_B = routing.counts_B == 0
    dy[~torch.isin(torch.arange(T), routing.tokens_R)] = torch.nan
    z[int(routing.offsets_B1[-1]) :] = torch.nan
    w_out[unused_B], bias[unused_B] = torch.nan, torch.nan
    return Case(routing, schedule(routing.offsets_B1, T * K, height), dy, z, w_out, bias, activation)


@dataclass(frozen=True, eq=False)
class Outputs:
    """What `data_gradient` writes."""

    dz: Tensor
    sh: Tensor
    ds: Tensor
    zdz: Tensor


def solve(
    c: Case,
    *,
    tile: Tile = TILE,
    trainable: int | None = None,
    w: Stored | None = None,
    term: RankTerm | None = None,
) -> Outputs:
    """By the kernel, into NaN; slots from `trainable` on are frozen."""
    R, F = c.z_RF.shape
    w = stored(c.w_out, trainable) if w is None else w
    blocks = column_blocks(c.inner, tile, w)
    out = Outputs(*(unwritten(R, F), unwritten(R, c.inner), unwritten(R, blocks), unwritten(c.schedule.tiles, blocks)))
    launches = data_gradient(
        *(c.dy_TH, c.z_RF, c.index, w),
        dz_RF=out.dz,
        sh_RI=out.sh,
        ds_RC=out.ds,
        zdz_MC=out.zdz,
        activation=c.activation,
        schedule=c.schedule,
        tile=tile,
        term=term,
    )
    run(launches)
    return out


@dataclass(frozen=True, eq=False)
class Truth:
    """The same in float64 by autograd: dz, sh (N, ...); ds <d, h> and dS with the bias (N,); zdz <z, dz> (N,)."""

    dz: Tensor
    sh: Tensor
    ds: Tensor
    ds_biased: Tensor
    zdz: Tensor


def truth(c: Case, added_NI: Tensor | None = None) -> Truth:
    """`added_NI` is what adapters add to d = dy @ W_out."""
    n = c.count
    z = c.z_RF[:n].double().requires_grad_()
    s = c.routing.weights_TK.flatten()[c.routing.places_R[:n]].double().requires_grad_()
    w, bias = c.w_out.double()[c.slot_N], c.bias_out.double()[c.slot_N]
    dy = c.dy_TH.double()[c.routing.tokens_R[:n]]
    h = reference.activate(z, c.activation)
    y = torch.einsum("ni,nhi->nh", h, w)
    loss = (s[:, None] * y * dy).sum()
    if added_NI is not None:
        loss = loss + (s[:, None] * h * added_NI).sum()
    dz, ds = torch.autograd.grad(loss, [z, s])
    sh = (s[:, None] * h).detach()
    return Truth(dz, sh, ds, ds + (dy * bias).sum(1), (z * dz).sum(1).detach())
