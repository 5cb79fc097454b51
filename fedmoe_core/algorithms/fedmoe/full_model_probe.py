"""Profiling the whole model on a client's validation data, if it can bear that, after some fine-tuning of adapters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fedmoe_core.budget.limits import Cost
from fedmoe_core.budget.passes import pass_cost
from fedmoe_core.client.step import Stepper, local_optimizer
from fedmoe_core.messages.measure import Measure
from fedmoe_core.messages.plan import Extras, ProbeContext, Reads
from fedmoe_core.model.submodel import SubModel
from fedmoe_core.server.planning import asked_costs, whole_surcharge
from fedmoe_core.server.state import Population


@dataclass(frozen=True)
class WholeModelProbe:
    """p_ij = n_ij / N of the whole model: how often each expert is among the chosen, per token, as "probe" (L, E).

    Attributes:
        tunings: passes over the batches of the client's local training that fit adapters on every expert, and the
            router, before the model is profiled; 0 profiles it as it is.
        lora_rank: rank of those adapters, which are dropped with the probe.
    """

    tunings: int
    lora_rank: int
    measures: ClassVar[Mapping[str, Measure]] = MappingProxyType({"probe": Measure("LE", most=1.0)})
    reads: ClassVar[Reads] = "all"

    def __call__(self, context: ProbeContext) -> dict[str, Tensor]:
        adapter, spec = context.adapter, context.adapter.spec
        if self.tunings:
            adapter.configure(context.params, SubModel(lora_rank=self.lora_rank, lora_seed=context.plan.seed))
            optimizer, prior_C = local_optimizer(adapter, context.train), context.log_prior_C
            stepper = Stepper(adapter, optimizer, context.train, seed=context.plan.seed, log_prior_C=prior_C)
            for _ in range(self.tunings):
                for batch in context.batches():
                    stepper.step(batch)
        else:
            nothing_LE = np.zeros((spec.num_layers, spec.num_experts), dtype=bool)
            adapter.configure(context.params, SubModel(trainable_LE=nothing_LE))
        hits_LE = torch.zeros(spec.num_layers, spec.num_experts, dtype=torch.float64)
        tokens = 0
        for batch in context.validation():
            adapter.evaluate(batch, with_stats=True)
            stats = [layer.last_stats for layer in adapter.moe]
            hits_LE += torch.stack([layer.hits_E.cpu() for layer in stats if layer is not None])
            tokens += int(batch.mask_SN.sum())
        return {"probe": hits_LE / max(tokens, 1)}


def affordable_probe(
    population: Population, client: int, extras: Extras, *, tunings: int, first_participation: bool
) -> tuple[WholeModelProbe, Cost] | None:
    """Return the probe of most ``tunings`` that a client can bear with the smallest sub-model, and what it costs.

    None where not even the model as it is can be profiled. The whole model has to be sent, stored and run over the
    validation data. The sub-model is a part of it, so the traffic down of a plan that probes is the cost's and
    ``model_rest``; adapters do not travel.
    """
    spec, config = population.spec, population.config
    all_LE = population.every_LE
    least_LE = all_LE & (np.arange(spec.num_experts) == 0)
    tokens = 0 if population.validation_tokens_C is None else int(population.validation_tokens_C[client])
    costs, tuned = asked_costs(population, extras), population.costs_at(config.lora.rank)
    least = costs.predict(least_LE, least_LE, local_steps=1, top_k=1)
    whole_down = costs.bytes_down(all_LE, first_participation=first_participation)
    for count in range(tunings, -1, -1):
        probing = replace(
            pass_cost(tuned if count else population.costs, all_LE, tokens=tokens),
            bytes_up=all_LE.size * 8,
            experts=all_LE.size,
        )
        if count:
            step = count * config.train.local_steps * tuned.step_flops(all_LE, all_LE)
            probing = probing.with_extra(Cost(memory_bytes=tuned.memory(all_LE, all_LE), flops=step))
        extra = whole_surcharge(population, client, replace(extras, surcharge=probing), served_LE=all_LE)
        if population.budgets[client].fits(replace(least.with_extra(extra), bytes_down=whole_down)):
            return WholeModelProbe(count, config.lora.rank), probing
    return None


def model_rest(population: Population, held_LE: np.ndarray) -> int:
    """Return the bytes down of the whole model beyond those of a sub-model."""
    return population.costs.bytes_down(np.ones_like(held_LE)) - population.costs.bytes_down(held_LE)
