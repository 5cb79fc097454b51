"""Low-rank adapters of the experts of one MoE layer, in global coordinates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedmoe_core.base.rng import counter_seed
from fedmoe_core.base.tensor_key import of_layer

FACTORS = ("a_in", "b_in", "a_out", "b_out")


@dataclass(frozen=True)
class LayerLora:
    """W_in + scale * b_in @ a_in and W_out + scale * b_out @ a_out of every expert, over frozen W (LoRA, 2106.09685).

    Attributes:
        a_in, b_in: (E, r, H) and (E, F, r), F = 2I for gated activations and I else.
        a_out, b_out: (E, r, I) and (E, H, r).
        scale: one number for all; it does not depend on a client's rank, so a truncated adapter means the same.
    """

    a_in: Tensor
    b_in: Tensor
    a_out: Tensor
    b_out: Tensor
    scale: float

    @classmethod
    def fresh(cls, w_in: Tensor, w_out: Tensor, *, rank: int, scale: float, seed: int) -> LayerLora:
        """Make adapters that change nothing yet for experts (E, F, H), (E, H, I): a uniform in +-1/sqrt(fan-in), b = 0.

        Drawn on the CPU from ``seed``, the same on every device.
        """
        generator = torch.Generator().manual_seed(seed)
        factors = {}
        for side, weight in (("in", w_in), ("out", w_out)):
            experts, rows, columns = weight.shape
            # Whatever torch's defaults are.
            fresh = torch.rand(experts, rank, columns, generator=generator, dtype=torch.float32, device="cpu")
            drawn = fresh.mul_(2).sub_(1).mul_(columns**-0.5)
            factors[f"a_{side}"], factors[f"b_{side}"] = drawn.to(weight), weight.new_zeros(experts, rows, rank)
        return cls.of(factors, scale)

    @classmethod
    def of(cls, factors: Mapping[str, Tensor], scale: float) -> LayerLora:
        """Take the factors from a mapping that has every name of ``FACTORS``."""
        return cls(factors["a_in"], factors["b_in"], factors["a_out"], factors["b_out"], scale)

    @property
    def rank(self) -> int:
        return self.a_in.shape[1]

    @property
    def factors(self) -> dict[str, Tensor]:
        """By name, in the order of ``FACTORS``."""
        return {name: getattr(self, name) for name in FACTORS}

    def to(self, device: torch.device) -> LayerLora:
        """Return the same on another device."""
        return LayerLora.of({name: factor.to(device) for name, factor in self.factors.items()}, self.scale)

    def truncated(self, rank: int) -> LayerLora:
        """Return the first ``rank`` ranks (HetLoRA's truncation).

        Raises:
            ValueError: a rank outside 1..r.
        """
        if not 1 <= rank <= self.rank:
            raise ValueError(f"rank {rank} is outside 1..{self.rank}, the rank of the adapters; choose one inside")
        cut = {name: first_ranks(name, factor, rank) for name, factor in self.factors.items()}
        return LayerLora.of(cut, self.scale)

    def with_rows(self, rows: Mapping[str, Mapping[int, Tensor]]) -> LayerLora:
        """Replace some experts' factors in a copy, by name and expert id; nothing given is changed."""
        own = {}
        for name in FACTORS:
            if given := rows.get(name, {}):
                own[name] = getattr(self, name).clone()
                for e, row in given.items():
                    own[name][e] = row
        return replace(self, **own) if own else self

    def change(self, name: str, expert: int) -> Tensor:
        """Return scale * b @ a of one expert's ``w_in`` or ``w_out``."""
        side = name.removeprefix("w_")
        a, b = getattr(self, f"a_{side}")[expert], getattr(self, f"b_{side}")[expert]
        return self.scale * (b @ a)


def end_to_end(trainable: Tensor, frozen: Tensor | None) -> Tensor:
    """Lay what learns and what only runs end to end; a copy only where there is some of both."""
    if frozen is None:
        return trainable
    # FSDP casts parameters and no buffers, so the two may differ in dtype.
    return torch.cat([trainable, frozen.to(trainable.dtype)]) if len(trainable) else frozen


class MergedRows(Mapping[int, Tensor]):
    """Rows of a matrix, those of ``merged`` experts with their adapters; made on reading, one by one."""

    def __init__(self, rows: Mapping[int, Tensor], lora: LayerLora, name: str, merged: frozenset[int]) -> None:
        self.rows, self.lora, self.name, self.merged = rows, lora, name, merged

    def __getitem__(self, expert: int) -> Tensor:
        row = self.rows[expert]
        return row + self.lora.change(self.name, expert) if expert in self.merged else row

    def __iter__(self) -> Iterator[int]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


def lora_of_layer(state: Mapping[str, Tensor], layer: int, lora: LoraSpec, *, rank: int | None, seed: int) -> LayerLora:
    """Return the adapters of a layer: the state's, cut to ``rank`` (None = whole), or fresh ones where it has none."""
    own = of_layer(layer, state)
    if lora.in_state:
        whole = LayerLora.of(own, lora.scale)
        return whole if rank is None else whole.truncated(rank)
    w_in, w_out = own["w_in"], own["w_out"]
    rank = lora.rank if rank is None else rank
    if not 1 <= rank <= lora.rank:
        raise ValueError(f"rank {rank} is outside 1..{lora.rank}, the rank that was declared; choose one inside")
    return LayerLora.fresh(w_in, w_out, rank=rank, scale=lora.scale, seed=counter_seed(seed, "adapters", layer))


def first_ranks(name: str, factor: Tensor, rank: int) -> Tensor:
    """View the first ``rank`` ranks of a stack of factors called ``name``: rows of an a, columns of a b."""
    return factor[:, :rank] if name.startswith("a_") else factor[..., :rank]


@dataclass(frozen=True)
class LoraSpec:
    """Adapters on the experts, over frozen base experts, as an algorithm declares them for its run.

    Attributes:
        rank: r of the largest adapters.
        alpha: the adapters' product counts alpha / rank, for every client alike whatever its own rank.
        in_state: whether the global model has the factors: they are then aggregated like experts, and the experts
            themselves never train. False: only plans with a ``lora_rank`` have adapters, made fresh (or from the plan's
            rows) and gone with the round; the experts remain what is aggregated.
        frozen_format: few bits that the live model stores the experts in under their adapters, as ``MoE``; None = as
            they are. Only with ``in_state``: experts that are aggregated change, and cannot be codes.
    """

    rank: int
    alpha: float
    in_state: bool = True
    frozen_format: str | None = None

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0:
            raise ValueError(f"rank={self.rank}, alpha={self.alpha} is out of range; give rank >= 1 and alpha > 0")
        if self.frozen_format is not None and not self.in_state:
            raise ValueError(
                f"frozen_format={self.frozen_format!r} is for experts that stay as they are, and adapters of one round "
                "change them; leave it out"
            )

    @property
    def scale(self) -> float:
        return self.alpha / self.rank
