"""Profiling the whole model on a client's validation data: the probe, what it costs, and who can bear it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fedmoe_core.budget import Cost
from fedmoe_core.planning import Asks, asked_costs, whole_surcharge
from fedmoe_core.probe import Bench
from fedmoe_core.state import Population


@dataclass(frozen=True)
class WholeModelProbe:
    """p_ij = n_ij / N of the global model: how often each expert is among the chosen, per token (L, E)."""

    name: str = "probe"

    def __call__(self, bench: Bench) -> dict[str, Tensor]:
        bench.adapter.configure(bench.params)
        hits_LE = torch.zeros(len(bench.adapter.moe), bench.adapter.spec.num_experts, dtype=torch.float64)
        tokens = 0
        for batch in bench.validation():
            bench.adapter.evaluate(batch, with_stats=True)
            stats = [layer.last_stats for layer in bench.adapter.moe]
            hits_LE += torch.stack([layer.hits_E.cpu() for layer in stats if layer is not None])
            tokens += int(batch.mask_SN.sum())
        return {self.name: hits_LE / max(tokens, 1)}


def affordable_probe(population: Population, client: int, asks: Asks, *, first_participation: bool) -> Cost | None:
    """What the probe costs a client, traffic down apart; None where it and the smallest sub-model exceed the budget.

    The whole model has to be sent, stored and run forward over the validation data. The sub-model is a part of it, so
    ``model_rest`` is the further traffic of a plan that probes.
    """
    all_LE = np.ones((population.spec.num_layers, population.spec.num_experts), dtype=bool)
    least_LE = all_LE & (np.arange(population.spec.num_experts) == 0)
    tokens = 0 if population.validation_tokens_C is None else int(population.validation_tokens_C[client])
    probing = Cost(
        memory_bytes=population.costs.forward_memory(all_LE),
        flops=population.costs.forward_flops(all_LE, tokens=tokens),
        bytes_up=all_LE.size * 8,
        experts=all_LE.size,
    )
    costs, asks = asked_costs(population, asks), {**asks, "surcharge": probing}
    least = costs.predict(least_LE, least_LE, local_steps=1, top_k=1)
    least = least.with_extra(whole_surcharge(population, client, asks, served_LE=all_LE))
    whole_down = costs.bytes_down(all_LE, first_participation=first_participation)
    return probing if population.budgets[client].fits(replace(least, bytes_down=whole_down)) else None


def model_rest(population: Population, held_LE: np.ndarray) -> int:
    """Bytes down of the whole model beyond those of a sub-model."""
    return population.costs.bytes_down(np.ones_like(held_LE)) - population.costs.bytes_down(held_LE)
