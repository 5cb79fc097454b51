"""Masked top-k routing: router logits in, one record out that says which token goes to which expert slot.

Shapes: T tokens, K top-k, E experts, B slots, C clients of a cohort, R = T * K rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedmoe_kernels.backends import BACKENDS
from fedmoe_kernels.routing import ops
from fedmoe_kernels.routing.rules import compute_dtype
from fedmoe_kernels.routing.stats import RouterStats
from fedmoe_kernels.slot_map import SlotMap


@dataclass(frozen=True, eq=False)
class Routing:
    """Which token goes to which slot; made once per forward and passed whole.

    A place is one (token, choice) pair, p = t * K + j. A row is a place that has a slot; rows are sorted by slot, then
    token, then choice, and occupy 0..N-1 of R = T * K, N = offsets_B1[-1]. R is fixed by the shapes, so nothing waits
    for the device. All index tensors are int64.

    Attributes:
        weights_TK: routing weight of each place, 0 where it has no row; float32 (float64 for float64 logits). The only
            differentiable field.
        experts_TK: expert id of each place, best first, -1 where it has no row.
        slots_TK: slot of each place, -1 where it has no row.
        rows_TK: row of each place, -1 where it has none; the inverse of `places_R`.
        tokens_R: token of each row, -1 from N on.
        places_R: place of each row, -1 from N on.
        offsets_B1: (B + 1,); slot b owns rows offsets_B1[b]..offsets_B1[b + 1] - 1.
        num_slots: B.
        stats: this call's router statistics, None unless asked for.
        rows_per_slot: what the kernels' tiles are chosen by, see `SlotMap`; None = from the shapes of this record.
    """

    weights_TK: Tensor
    experts_TK: Tensor
    slots_TK: Tensor
    rows_TK: Tensor
    tokens_R: Tensor
    places_R: Tensor
    offsets_B1: Tensor
    num_slots: int
    stats: RouterStats | None = None
    rows_per_slot: int | None = None

    @property
    def counts_B(self) -> Tensor:
        """(B,) int64, rows of each slot."""
        return self.offsets_B1[1:] - self.offsets_B1[:-1]

    @classmethod
    def from_topk(
        cls,
        experts_TK: Tensor,
        weights_TK: Tensor,
        slot_map: SlotMap | int,
        *,
        client_T: Tensor | None = None,
        valid_T: Tensor | None = None,
        backend: str = "auto",
    ) -> Routing:
        """Make the record for a model that routes itself.

        Args:
            experts_TK: integer expert ids, best first. Ids outside [0, E) and absent experts mean "not here": no row.
            weights_TK: their weights, differentiable; cast to float32 unless float64, and 0 where there is no row.
            slot_map: where the experts lie; a number E = all of them, expert e in slot e.
            client_T, valid_T, backend: as in `route`.

        Raises:
            ValueError: for shapes, dtypes or devices that do not fit together.

        Example:
            >>> import torch
            >>> slots = SlotMap.build(torch.tensor([True, True, True]))
            >>> experts, weights = torch.tensor([[2, 0], [2, 1]]), torch.tensor([[0.7, 0.3], [0.6, 0.4]])
            >>> routing = Routing.from_topk(experts, weights, slots)
            >>> routing.counts_B, routing.tokens_R  # rows of each slot, and the token of each row
            (tensor([1, 1, 2]), tensor([0, 1, 0, 1]))
        """
        if experts_TK.dim() != 2 or experts_TK.shape != weights_TK.shape or experts_TK.is_floating_point():
            raise ValueError(
                f"experts_TK is {experts_TK.dtype} {tuple(experts_TK.shape)}, weights_TK {tuple(weights_TK.shape)}; "
                "both must be (T, K), the experts integers"
            )
        if weights_TK.device != experts_TK.device:
            raise ValueError(f"weights_TK is on {weights_TK.device}, experts_TK on {experts_TK.device}; move one")
        check_backend(backend)
        if isinstance(slot_map, int):
            table_CE = table_of(None, experts_TK, client_T, valid_T, num_experts=slot_map)
            num_slots, tile_rows = slot_map, None
        else:
            table_CE = table_of(slot_map, experts_TK, client_T, valid_T)
            num_slots, tile_rows = slot_map.num_slots, slot_map.tile_rows
        experts_TK, slots_TK, rows_TK, tokens_R, places_R, offsets_B1 = ops.place_rows(
            experts_TK, table_CE, client_T, valid_T, num_slots, backend
        )
        weights_TK = weights_TK.to(compute_dtype(weights_TK.dtype)).where(slots_TK >= 0, 0.0)
        index = (experts_TK, slots_TK, rows_TK, tokens_R, places_R, offsets_B1)
        return cls(weights_TK, *index, num_slots, rows_per_slot=tile_rows)


def check_backend(backend: str) -> None:
    """Refuse a backend that does not exist."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; choose one of {', '.join(BACKENDS)}")


def table_of(
    slot_map: SlotMap | None,
    like_T: Tensor,
    client_T: Tensor | None,
    valid_T: Tensor | None,
    *,
    num_experts: int | None = None,
) -> Tensor:
    """Return the slot table (C, E) for these tokens, after the checks on the map and the per-token arguments.

    Without a map every expert is in its own slot; E is then ``num_experts``, or the width of ``like_T``.
    """
    T, E, device = like_T.shape[0], num_experts or like_T.shape[1], like_T.device
    for name, per_token, dtype in (("client_T", client_T, torch.int64), ("valid_T", valid_T, torch.bool)):
        if per_token is None:
            continue
        if per_token.shape != (T,) or per_token.dtype != dtype or per_token.device != device:
            raise ValueError(
                f"{name} is {per_token.dtype} {tuple(per_token.shape)} on {per_token.device}; "
                f"it must be {dtype} ({T},) on {device}"
            )
    if (slot_map is not None and slot_map.num_clients is not None) != (client_T is not None):
        raise ValueError("client_T goes with a cohort's SlotMap of shape (C, E); give both or neither")
    if slot_map is None:
        return torch.arange(E, device=device)[None]
    if slot_map.slot_of_expert.device != device:
        raise ValueError(f"the SlotMap is on {slot_map.slot_of_expert.device}, the tokens on {device}; use SlotMap.to")
    return slot_map.slot_of_expert.view(-1, slot_map.num_experts)
