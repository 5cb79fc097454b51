"""HetLoRA on live layers and exact sums: the tail's loss, norms after training, zeros for missing ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fedmoe_core.algorithms.lora.factors import Factors, resize, tail_penalty
from fedmoe_core.base.tensor_key import TensorKey
from fedmoe_core.budget.cost_model import CostModel
from fedmoe_core.client.traffic import start_of
from fedmoe_core.layer.lora import FACTORS
from fedmoe_core.layer.recording import Tape
from fedmoe_core.messages.measure import Measure
from fedmoe_core.messages.plan import ProbeContext, Reads
from fedmoe_core.server.means import Sums

SIDES = ("in", "out")
LOGITS = 2  # tables of logits that a tape keeps


@dataclass(frozen=True)
class TailLoss:
    """``weight`` x the sum over all trainable adapters of ||B[:, keep:]||_F ||A[keep:, :]||_F (HetLoRA [N]).

    Attributes:
        weight: lambda.
        keep: ranks that pruning would leave.
        tables: as ``AuxLoss``; see ``tail_tables``.
        others: as ``EarlyLoss``: kept logits.
    """

    weight: float
    keep: int
    tables: int
    others: int = LOGITS

    def __call__(self, tape: Tape) -> Tensor:
        total = torch.zeros((), device=tape.layers[0].device)
        for layer in tape.layers:
            for side in SIDES:
                if layer.trainable_experts:
                    a, b = (layer.learning[f"{letter}_{side}"] for letter in "ab")
                    total = total + tail_penalty(Factors(a, b), self.keep).sum()
        return self.weight * total


def tail_tables(costs: CostModel) -> int:
    """Count the tables that a ``TailLoss`` may keep: kept logits, and float32 gradients of every factor."""
    return LOGITS + math.ceil(2 * costs.adapter_params / costs.tokens)


@dataclass(frozen=True)
class RankProbe:
    """After training: ||B A||_F and ||W||_F of each expert over both matrices, and the tail's product before and after.

    Attributes:
        keep: ranks that pruning would leave.
    """

    keep: int
    measures: ClassVar[Mapping[str, Measure]] = MappingProxyType(
        {"norm_LE": Measure("LE"), "base_LE": Measure("LE"), "tail_before": Measure(""), "tail_after": Measure("")}
    )
    reads: ClassVar[Reads] = "permitted"

    def __call__(self, context: ProbeContext) -> dict[str, Tensor]:
        spec, plan, trained = context.adapter.spec, context.plan, context.adapter.trained()
        product_LE = torch.zeros(spec.num_layers, spec.num_experts, dtype=torch.float64)
        base_LE = torch.zeros_like(product_LE)
        tails = torch.zeros(2, dtype=torch.float64)
        for layer, trains_E in enumerate(plan.trainable_LE):
            experts = torch.from_numpy(np.flatnonzero(trains_E))
            for side in SIDES:
                keys = [str(TensorKey(layer, f"{letter}_{side}")) for letter in "ab"]
                weight = context.params[str(TensorKey(layer, f"w_{side}"))]
                base_LE[layer] += torch.linalg.matrix_norm(weight).double().cpu() ** 2
                if not len(experts):
                    continue
                after = Factors(*(trained[key] for key in keys))
                before = Factors(*(start_of(context.params, key, plan) for key in keys))
                product_LE[layer, experts] += squared_norm(after).cpu()
                tails += torch.stack([tail_penalty(one, self.keep).sum().double().cpu() for one in (before, after)])
        return {
            "norm_LE": product_LE.sqrt(),
            "base_LE": base_LE.sqrt(),
            "tail_before": tails[0],
            "tail_after": tails[1],
        }


def squared_norm(adapter: Factors) -> Tensor:
    """Return ||B A||_F^2 = tr((B^T B)(A A^T)), float64 over the leading axes, without the full-sized product [D]."""
    b_rr, a_rr = adapter.b.mT @ adapter.b, adapter.a @ adapter.a.mT
    return (b_rr.double() * a_rr.double()).sum(dim=(-2, -1)).clamp(min=0)


def padded(deltas: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Pad factors with zeros for the ranks that the client did not have (HetLoRA [N]); other tensors as they are."""
    whole = dict(deltas)
    for key in deltas:
        place = TensorKey.parse(key)
        if place.name in FACTORS and place.name.startswith("a_"):
            other = str(TensorKey(place.layer, place.name.replace("a_", "b_")))
            whole[key], whole[other] = resize(Factors(deltas[key], deltas[other]), rank)
    return whole


def without_missing_ranks(
    means: Mapping[str, Tensor], old: Mapping[str, Tensor], sums: Sums, votes: Sequence[tuple[int, np.ndarray]]
) -> dict[str, Tensor]:
    """Turn means of deltas into HetLoRA's means of zero-padded factors [N].

    A delta that is zero where a client lacks the rank says "no change". A padded factor that is zero there says
    "nothing", so the old value loses the weight of the clients without the rank. Weights are those of the sums. They
    are whole numbers, so the order of clients changes no bit.

    Args:
        means: new factors by ``expert_mean``.
        old: the global model before the round.
        sums: the round's sums.
        votes: of each accepted client its rank and its expert weights.
    """
    new = dict(means)
    for spec in sums.specs:
        if spec.name not in FACTORS:
            continue
        axis = 0 if spec.name.startswith("a_") else 1
        ranks = spec.shape[1 + axis]
        missing_ER = torch.zeros(spec.shape[0], ranks, dtype=torch.int64)
        for rank, weight_LE in votes:
            missing_ER[:, rank:] += torch.from_numpy(sums.settings.quantize(weight_LE)[spec.layer])[:, None]
        den_E = sums.expert_den_LE[spec.layer].cpu().clamp(min=1)
        lost_ER = (missing_ER.double() / den_E[:, None].double()).to(means[spec.key].device)
        factor = lost_ER[:, :, None] if axis == 0 else lost_ER[:, None, :]
        shrunk = means[spec.key].double() - factor * old[spec.key].double()
        new[spec.key] = torch.where(factor > 0, shrunk.to(means[spec.key].dtype), means[spec.key])
    return new
