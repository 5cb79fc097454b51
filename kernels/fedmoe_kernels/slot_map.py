"""SlotMap: which slot of a compact store holds which expert.

Shapes: E experts, B slots, C clients of a cohort.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

# Rows per slot that a cohort's tiles are chosen for when its plan says nothing: two tiles of the tallest kind.
_COHORT_ROWS = 256


@dataclass(frozen=True, eq=False)
class SlotMap:
    """Where each expert's weights lie in a compact store; made once per plan, so that every size is known on the host.

    Attributes:
        slot_of_expert: (E,) int64, the slot of each expert id, -1 = absent; or (C, E), the slots of C clients laid end
            to end. Every slot 0..num_slots-1 appears exactly once in the whole table, or with `owner_B` at least once.
        num_slots: B, the number of slots.
        rows_per_slot: rows that a slot is expected to get, from the plan: tokens * k / slots of one client. It chooses
            the kernels' tiles, so clients of a cohort get the bits that each gets alone with the same number.
            None = from each call's own shapes; for a cohort, which has shapes that vary with its clients, a fixed 256.
        owner_B: (B,) int64, the place in the flattened table whose expert each slot stores, where other experts share
            slots (`SlotMap.shared`); None = no slot is shared.

    The values of a table on "meta", or of a fake one, cannot be read, and are not checked.

    Raises:
        ValueError: when the table is not a bijection between the present experts and the slots, or, with `owner_B`, not
            onto them; or when a client has no expert.
    """

    slot_of_expert: Tensor
    num_slots: int
    rows_per_slot: int | None = None
    owner_B: Tensor | None = None

    def __post_init__(self) -> None:
        table = self.slot_of_expert
        if self.rows_per_slot is not None and self.rows_per_slot < 1:
            raise ValueError(f"rows_per_slot is {self.rows_per_slot}; give the plan's number, at least 1, or None")
        if table.dtype != torch.int64 or table.dim() not in (1, 2):
            raise ValueError(
                f"slot_of_expert is {table.dtype} {tuple(table.shape)}; it must be int64 of shape (E,) or (C, E)"
            )
        if has_no_values(table):
            return
        present = table >= 0
        if not bool(present.any(dim=-1).all()):
            raise ValueError("a client of slot_of_expert has no permitted expert; permit at least one per client")
        if self.owner_B is not None:
            self._check_owners(self.owner_B)
            return
        if not torch.equal(table[present].sort().values, torch.arange(self.num_slots, device=table.device)):
            raise ValueError(
                f"slot_of_expert does not hold each slot of 0..{self.num_slots - 1} exactly once; "
                "build it with SlotMap.build(permitted_E, trainable_E)"
            )

    @classmethod
    def build(
        cls, permitted_E: Tensor, trainable_E: Tensor | None = None, *, rows_per_slot: int | None = None
    ) -> SlotMap:
        """Number the permitted experts: trainable ones first, then frozen, by client and ascending expert id in each.

        Args:
            permitted_E: bool (E,), or (C, E) for a cohort: what each client stores. At least one per client.
            trainable_E: bool of the same shape, a subset of `permitted_E`; None = all permitted.
            rows_per_slot: see the class.

        Returns:
            The map. In a cohort all clients' trainable slots come first, so that one trainable tensor serves them all.

        Raises:
            ValueError: for another dtype or shape, a trainable expert that is not permitted, or a client without any.

        Example:
            >>> import torch
            >>> held, trains = torch.tensor([True, False, True, True]), torch.tensor([False, False, True, True])
            >>> SlotMap.build(held, trains).slot_of_expert  # experts 2 and 3 train, 0 is frozen, 1 is absent
            tensor([ 2, -1,  0,  1])
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
        return cls(table.view(permitted_E.shape), order.numel(), rows_per_slot)

    @classmethod
    def shared(
        cls,
        permitted_E: Tensor,
        trainable_E: Tensor | None = None,
        *,
        alias_E: Tensor,
        rows_per_slot: int | None = None,
    ) -> SlotMap:
        """Make the map of `build`, with absent experts served by the slots of experts that the same client holds.

        Top-k still chooses among the original experts, held and served. Two choices of a token that land on one slot
        are two rows of it, whose weights add up in the sum over the token's rows.

        Args:
            permitted_E, trainable_E, rows_per_slot: as `build`.
            alias_E: int64 of the same shape; the id of the permitted expert whose slot serves this one, -1 = none.

        Raises:
            ValueError: as `build`; or an alias of another dtype or shape, of a permitted expert to another one, or to
                an expert that its client does not hold.
        """
        own = cls.build(permitted_E, trainable_E, rows_per_slot=rows_per_slot)
        if alias_E.dtype != torch.int64 or alias_E.shape != permitted_E.shape:
            raise ValueError(
                f"alias_E is {alias_E.dtype} {tuple(alias_E.shape)}; it must be int64 {tuple(permitted_E.shape)}"
            )
        served = alias_E >= 0
        itself_E = torch.arange(own.num_experts, device=alias_E.device).expand_as(alias_E)
        if bool((served & permitted_E & (alias_E != itself_E)).any()):
            raise ValueError("alias_E sends a permitted expert to another slot; only absent experts may be served so")
        target_E = alias_E.clamp(min=0)
        inside = bool((target_E < own.num_experts).all())
        if not inside or not bool(permitted_E.gather(-1, target_E)[served].all()):
            raise ValueError("alias_E names an expert that its client does not hold; name a permitted one, or -1")
        table = torch.where(served, own.slot_of_expert.gather(-1, target_E), own.slot_of_expert)
        return cls(table, own.num_slots, rows_per_slot, own._place_of_slot_B)

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
        """(B,) int64, the expert id whose weights each slot stores."""
        return self._place_of_slot_B % self.num_experts

    @property
    def client_of_slot_B(self) -> Tensor:
        """(B,) int64, the client that owns each slot; all 0 for the map of one client."""
        return self._place_of_slot_B // self.num_experts

    @property
    def _place_of_slot_B(self) -> Tensor:
        if self.owner_B is not None:
            return self.owner_B
        table = self.slot_of_expert.flatten()
        # Absent experts sort first, so the last B places of the order are the slots 0..B-1.
        return table.argsort(stable=True)[table.numel() - self.num_slots :]

    def to(self, device: torch.device | str) -> SlotMap:
        """Return the same map on another device."""
        owner_B = None if self.owner_B is None else self.owner_B.to(device)
        return SlotMap(self.slot_of_expert.to(device), self.num_slots, self.rows_per_slot, owner_B)

    def beside(self, like: Tensor) -> SlotMap:
        """Return the same map for use with ``like``, see `index_beside`."""
        table, owner_B = index_beside(self.slot_of_expert, like), self.owner_B
        if table is self.slot_of_expert:
            return self
        owner_B = None if owner_B is None else index_beside(owner_B, like)
        return SlotMap(table, self.num_slots, self.rows_per_slot, owner_B)

    @property
    def tile_rows(self) -> int | None:
        """The number that chooses the tiles; None = from a call's own shapes."""
        if self.rows_per_slot is None and self.num_clients is not None:
            return _COHORT_ROWS
        return self.rows_per_slot

    def _check_owners(self, owner_B: Tensor) -> None:
        table = self.slot_of_expert.flatten()
        slots_B = torch.arange(self.num_slots, device=table.device)
        if (
            owner_B.shape != slots_B.shape
            or not torch.equal(table[owner_B], slots_B)
            or int(table.max()) >= len(slots_B)
        ):
            raise ValueError(
                f"slot_of_expert does not map its owners onto the slots 0..{self.num_slots - 1}; "
                "build it with SlotMap.shared(permitted_E, trainable_E, alias_E=...)"
            )


def has_no_values(tensor: Tensor) -> bool:
    """Tell whether only the shape of a tensor is known: it is on "meta", or fake."""
    return tensor.device.type == "meta" or isinstance(tensor, FakeTensor)


def index_beside(index: Tensor, like: Tensor) -> Tensor:
    """Return a real index tensor for use with ``like``: on its device, and fake where it is fake.

    A fake ``like`` whose mode takes real tensors beside it, as that of torch.export, gets the real one.
    """
    if isinstance(like, FakeTensor) and not like.fake_mode.allow_non_fake_inputs:
        fake: Tensor = like.fake_mode.from_tensor(index)
        return fake
    return index if index.device == like.device else index.to(like.device)
