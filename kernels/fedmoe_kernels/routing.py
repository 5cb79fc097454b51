"""Masked top-k routing: router logits in, one record out that says which token goes to which expert slot.

Shapes: T tokens, K top-k, E experts, B slots, C clients of a cohort, R = T * K rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedmoe_kernels.stats import RouterStats


@dataclass(frozen=True, eq=False)
class SlotMap:
    """Where each expert's weights lie in a compact store; made once per plan, so that every size is known on the host.

    Attributes:
        slot_of_expert: (E,) int64, the slot of each expert id, -1 = absent; or (C, E), the slots of C clients laid end
            to end. Every slot 0..num_slots-1 appears exactly once in the whole table.
        num_slots: B, the number of slots.

    Raises:
        ValueError: when the table is not a bijection between the present experts and the slots, or a client has none.
    """

    slot_of_expert: Tensor
    num_slots: int

    def __post_init__(self) -> None:
        table = self.slot_of_expert
        if table.dtype != torch.int64 or table.dim() not in (1, 2):
            raise ValueError(
                f"slot_of_expert is {table.dtype} {tuple(table.shape)}; it must be int64 of shape (E,) or (C, E)"
            )
        present = table >= 0
        if not bool(present.any(dim=-1).all()):
            raise ValueError("a client of slot_of_expert has no permitted expert; permit at least one per client")
        if not torch.equal(table[present].sort().values, torch.arange(self.num_slots, device=table.device)):
            raise ValueError(
                f"slot_of_expert does not hold each slot of 0..{self.num_slots - 1} exactly once; "
                "build it with SlotMap.build(permitted_E, trainable_E)"
            )

    @classmethod
    def build(cls, permitted_E: Tensor, trainable_E: Tensor | None = None) -> SlotMap:
        """Number the permitted experts: trainable ones first, then frozen, by client and ascending expert id in each.

        Args:
            permitted_E: bool (E,), or (C, E) for a cohort: what each client stores. At least one per client.
            trainable_E: bool of the same shape, a subset of `permitted_E`; None = all permitted.

        Returns:
            The map. In a cohort all clients' trainable slots come first, so that one trainable tensor serves them all.

        Raises:
            ValueError: for another dtype or shape, a trainable expert that is not permitted, or a client without any.
        """
        trainable_E = permitted_E if trainable_E is None else trainable_E
        if permitted_E.dtype != torch.bool or trainable_E.dtype != torch.bool or permitted_E.shape != trainable_E.shape:
            raise ValueError(
                f"permitted_E is {permitted_E.dtype} {tuple(permitted_E.shape)}, trainable_E {trainable_E.dtype} "
                f"{tuple(trainable_E.shape)}; both must be bool masks of one shape, (E,) or (C, E)"
            )
        if bool((trainable_E & ~permitted_E).any()):
            raise ValueError("a trainable expert is not permitted; trainable_E must be a subset of permitted_E")
        order = torch.cat([trainable_E.flatten().nonzero(), (permitted_E & ~trainable_E).flatten().nonzero()]).flatten()
        table = torch.full((permitted_E.numel(),), -1, dtype=torch.int64, device=permitted_E.device)
        table[order] = torch.arange(order.numel(), device=order.device)
        return cls(table.view(permitted_E.shape), order.numel())

    @property
    def num_experts(self) -> int:
        """E, the number of experts of the global layer."""
        return self.slot_of_expert.shape[-1]

    @property
    def num_clients(self) -> int | None:
        """C for a cohort, None for the map of one client."""
        return self.slot_of_expert.shape[0] if self.slot_of_expert.dim() == 2 else None

    @property
    def expert_of_slot_B(self) -> Tensor:
        """(B,) int64, the expert id that each slot holds."""
        return self._place_of_slot_B % self.num_experts

    @property
    def client_of_slot_B(self) -> Tensor:
        """(B,) int64, the client that owns each slot; all 0 for the map of one client."""
        return self._place_of_slot_B // self.num_experts

    @property
    def _place_of_slot_B(self) -> Tensor:
        table = self.slot_of_expert.flatten()
        # Absent experts sort first, so the last B places of the order are the slots 0..B-1.
        return table.argsort(stable=True)[table.numel() - self.num_slots :]

    def to(self, device: torch.device | str) -> SlotMap:
        """The same map on another device."""
        return SlotMap(self.slot_of_expert.to(device), self.num_slots)


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

    @property
    def counts_B(self) -> Tensor:
        """(B,) int64, rows of each slot."""
        return self.offsets_B1[1:] - self.offsets_B1[:-1]
