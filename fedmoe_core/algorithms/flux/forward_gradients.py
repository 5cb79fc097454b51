"""Squared gradient norms of held but frozen experts from forward passes alone: Flux's exploration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from fedmoe_core.algorithms.flux.utility import spsa
from fedmoe_core.base.rng import counter_seed
from fedmoe_core.budget.cost_model import CostModel
from fedmoe_core.budget.limits import Cost
from fedmoe_core.layer.state import BIASES, MATRICES
from fedmoe_core.messages.measure import Measure
from fedmoe_core.messages.plan import ProbeContext, Reads


@dataclass(frozen=True)
class ForwardEstimates:
    """|grad|^2 of the mean loss on the round's first batch, for each explored expert, (L, E); 0 elsewhere.

    Run after local training, on the trained sub-model, one expert after another; see ``utility.spsa``.

    Attributes:
        experts: (layer, expert id), each held and frozen.
        sigma, probes: of ``utility.spsa``.
    """

    experts: tuple[tuple[int, int], ...]
    sigma: float
    probes: int
    measures: ClassVar[Mapping[str, Measure]] = MappingProxyType({"norm_sq": Measure("LE")})
    reads: ClassVar[Reads] = "permitted"

    def __call__(self, context: ProbeContext) -> dict[str, Tensor]:
        adapter = context.adapter
        norm_sq_LE = torch.zeros(len(adapter.moe), adapter.spec.num_experts, dtype=torch.float64)
        batch = next(iter(context.batches()))
        for number, expert in self.experts:
            layer = adapter.moe[number]
            slot = layer.frozen_experts.index(expert)
            parts = [getattr(layer, f"{name}_frozen")[slot] for name in layer.names if name in (*MATRICES, *BIASES)]
            start = parameters_to_vector(parts)

            def install(flat: Tensor, parts: list[Tensor] = parts) -> None:
                for part, values in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
                    part.copy_(values.view_as(part))

            def loss(flat: Tensor, install: object = install) -> float:
                assert callable(install)
                install(flat)
                found = adapter.evaluate(batch, log_prior_C=context.log_prior_C)
                return found.loss_sum / found.count

            seed = counter_seed(context.plan.seed, "forward-only", number, expert)
            try:
                norm_sq_LE[number, expert] = spsa(loss, start, sigma=self.sigma, probes=self.probes, seed=seed)
            finally:
                install(start)
        return {"norm_sq": norm_sq_LE}


def estimate_cost(costs: CostModel, held_LE: np.ndarray, *, explored: int, probes: int) -> Cost:
    """Return the cost of the estimates: 2 * probes forward passes of one batch for each explored expert."""
    if not explored:
        return Cost()
    all_LE = np.ones_like(held_LE)
    return Cost(
        memory_bytes=costs.forward_memory(held_LE) + 8 * 4 * costs.expert_params,
        flops=2 * probes * explored * costs.forward_flops(all_LE, tokens=costs.tokens),
        bytes_up=8 * explored,
    )
