"""One client's part of a cohort layer, read off the layer that it would have alone, and how parts are laid end to end.

Shapes: C clients of a cohort, E experts of the layer, Bt the slots of all clients that train, B all slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmoe_core.layer.lora import FACTORS
from fedmoe_core.layer.moe import MoE
from fedmoe_kernels.quantized import Quantized
from fedmoe_kernels.slot_map import SlotMap


@dataclass(frozen=True)
class ClientLayer:
    """The tensors of one client's MoE layer, copied; the layer may become another client's afterwards.

    Attributes:
        trainable, frozen: expert ids of its slots.
        slot_map: of the layer alone, on the CPU.
        learning: what trains by name, one row for each trainable expert, without the output's factor.
        frozen_rows: what the other slots of a matrix or bias are stored in. With adapters these are the base experts
            of all slots, those that train first.
        steering: the whole router, and its bias, by name, (E, ...).
        correction_bias: (E,), or None.
        frozen_factors: adapters of frozen slots that are not merged, by name; empty where there are none.
        lora_scale: of the adapters; None = there are none.
        out_scale: the output's factor, or None.
        shares: whether its base experts are those of the state, so that other clients can run the same ones.
    """

    trainable: tuple[int, ...]
    frozen: tuple[int, ...]
    slot_map: SlotMap
    learning: dict[str, Tensor]
    frozen_rows: dict[str, Tensor | Quantized]
    steering: dict[str, Tensor]
    correction_bias: Tensor | None
    frozen_factors: dict[str, Tensor]
    lora_scale: float | None
    out_scale: Tensor | None
    shares: bool

    @classmethod
    def of(cls, layer: MoE, *, shares: bool = True) -> ClientLayer:
        """Copy what ``layer`` trains, and take over what it has frozen, which ``load_global`` always makes afresh."""
        learning, frozen_rows = {}, {}
        for name in layer.slot_names:
            rows, held = layer.stored(name)
            frozen_rows[name] = held
            if layer.lora_scale is None:
                learning[name] = rows.clone()
        steering = {"router": layer.router_EH().detach().clone()}
        if (bias_E := layer.router_bias_E()) is not None:
            steering["router_bias"] = bias_E.detach().clone()
        factors = {} if layer.lora_scale is None else {name: getattr(layer, name) for name in FACTORS}
        learning |= {name: factor.detach().clone() for name, factor in factors.items()}
        beside = {name: getattr(layer, f"{name}_frozen") for name in factors}
        return cls(
            layer.trainable_experts,
            layer.frozen_experts,
            layer.slot_map.to("cpu"),
            learning,
            frozen_rows,
            steering,
            None if layer.correction_bias is None else layer.correction_bias.clone(),
            {name: factor.clone() for name, factor in beside.items() if factor is not None},
            layer.lora_scale,
            None if layer.out_scale is None else layer.out_scale.detach().clone(),
            shares,
        )

    @property
    def form(self) -> tuple[object, ...]:
        """What the clients of a cohort must agree in: which tensors there are, and the adapters' rank and scale."""
        rank = self.learning["a_in"].shape[1] if "a_in" in self.learning else None
        return (*self.learning, *self.steering, *self.frozen_rows, self.lora_scale, rank, self.out_scale is None)


def laid_out(parts: Sequence[ClientLayer], *, rows_per_slot: int | None) -> SlotMap:
    """Return the (C, E) map of the parts' slots: those that train first, by client and ascending expert id."""
    permitted_CE, trainable_CE = (
        torch.zeros(len(parts), parts[0].slot_map.num_experts, dtype=torch.bool) for _ in range(2)
    )
    alias_CE = torch.full(permitted_CE.shape, -1)
    for c, part in enumerate(parts):
        permitted_CE[c, list(part.trainable + part.frozen)] = True
        trainable_CE[c, list(part.trainable)] = True
        ids_B = torch.tensor(part.trainable + part.frozen)
        table_E = part.slot_map.slot_of_expert
        served_E = (table_E >= 0) & ~permitted_CE[c]
        alias_CE[c] = torch.where(served_E, ids_B[table_E.clamp(min=0)], -1)
    if (alias_CE >= 0).any():
        return SlotMap.shared(permitted_CE, trainable_CE, alias_E=alias_CE, rows_per_slot=rows_per_slot)
    return SlotMap.build(permitted_CE, trainable_CE, rows_per_slot=rows_per_slot)


def end_to_end(stacks: Sequence[Tensor | Quantized]) -> Tensor | Quantized:
    """Lay stacks of one form end to end, values or codes."""
    first = stacks[0]
    if isinstance(first, Tensor):
        return torch.cat([stack for stack in stacks if isinstance(stack, Tensor)])
    coded = [stack for stack in stacks if isinstance(stack, Quantized)]
    whole = None if first.whole is None else torch.cat([stack.whole for stack in coded if stack.whole is not None])
    codes, scale = torch.cat([stack.codes for stack in coded]), torch.cat([stack.scale for stack in coded])
    return Quantized(codes, scale, first.format, whole)


@dataclass(frozen=True)
class Bases:
    """Which base experts the slots of a cohort with adapters run: each that several clients share is stored once.

    Attributes:
        owners: for each stored row the client and the place among that client's stored rows that it comes from.
        row_of_slot: for each slot of the cohort the stored row that it runs.
    """

    owners: tuple[tuple[int, int], ...]
    row_of_slot: tuple[int, ...]

    @classmethod
    def of(cls, parts: Sequence[ClientLayer]) -> Bases:
        """Find them. A frozen expert may have its adapter merged, so it is another one than the same that trains."""
        rows: dict[tuple[int, bool, int], int] = {}
        owners: list[tuple[int, int]] = []
        found: list[int] = []
        for learns in (True, False):
            for c, part in enumerate(parts):
                for place, expert in enumerate(part.trainable + part.frozen):
                    if (place < len(part.trainable)) is not learns:
                        continue
                    key = (expert, learns, -1 if part.shares else c)
                    if key not in rows:
                        rows[key] = len(owners)
                        owners.append((c, place))
                    found.append(rows[key])
        return cls(tuple(owners), tuple(found))

    def stack(self, parts: Sequence[ClientLayer], name: str) -> Tensor | Quantized:
        """Gather the stored rows of a matrix or bias."""
        return end_to_end([_one(parts[c].frozen_rows[name], place) for c, place in self.owners])


def _one(stack: Tensor | Quantized, place: int) -> Tensor | Quantized:
    return stack[place] if isinstance(stack, Quantized) else stack[place : place + 1]
