"""Dry steps of cohorts: what the closed forms cannot know about many clients over one trunk."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from fedmoe_core.budget.cohort_memory import Share, cohort_memory, transients_of
from fedmoe_core.budget.cost_model import CostModel
from fedmoe_core.budget.peak_memory import trace_memory
from fedmoe_core.client.cohort.step import CohortStepper
from fedmoe_core.config.run_config import TrainConfig
from fedmoe_core.data.batches import Batch
from fedmoe_core.model.cohort import CohortAdapter
from fedmoe_core.model.submodel import SubModel
from fedmoe_core.simulation.calibrate import NEVER, even_prior, first_experts, stage_marker


@dataclass(frozen=True)
class CohortMeter:
    """The cost model of cohorts: closed forms for what clients own, and a dry step for each size that is asked for.

    The rest does not grow in a straight line with the clients. The loops of a CPU work in tiles of a bounded size, so
    it grows by 4.5 MB a client up to some size and by 2.7 MB beyond it (16 rows of 64 tokens, width 128). Hence the
    very size that will run is measured, once.

    Attributes:
        adapter, params, train: the live model, the warm one, and settings of local training.
        costs: the cost model of one client that only trains, measured, by the rank of its plan.
        batches: batches of the clients' shape, one of them with padding where there may be some.
    """

    adapter: CohortAdapter
    params: dict[str, Tensor]
    train: TrainConfig
    costs: Callable[[int | None], CostModel]
    batches: tuple[Batch, ...]
    # By rank, k' and the number of clients.
    _measured: dict[tuple[int | None, int, int], tuple[int, ...]] = field(
        default_factory=dict, repr=False, compare=False
    )

    @classmethod
    def of(
        cls,
        adapter: CohortAdapter,
        params: dict[str, Tensor],
        train: TrainConfig,
        batch: Batch,
        *,
        costs: Callable[[int | None], CostModel],
        padding: bool,
    ) -> CohortMeter:
        """Make the meter for batches shaped like ``batch``; ``padding``: whether clients' batches may have some."""
        whole_SN = torch.ones_like(batch.mask_SN)
        padded_SN = whole_SN.clone()
        padded_SN[0, -1] = False
        batches = tuple(replace(batch, mask_SN=mask_SN) for mask_SN in (whole_SN, padded_SN)[: 1 + padding])
        return cls(adapter, params, replace(train, token_dropout=min(train.token_dropout, NEVER)), costs, batches)

    def memory(self, shares: Sequence[Share]) -> int:
        """Predict the peak of a cohort's step, in bytes; at least what is measured, and within a few per cent."""
        return cohort_memory(self.costs(shares[0].lora_rank), shares, self._transients(shares[0], len(shares)))

    def bound(self, shares: Sequence[Share]) -> int:
        """Bound the same without a dry step of that size: transients grow no faster than the clients."""
        pair = self._transients(shares[0], 2)
        grown = [math.ceil(each * len(shares) / 2) for each in pair]
        return cohort_memory(self.costs(shares[0].lora_rank), shares, grown)

    def _transients(self, like: Share, clients: int) -> tuple[int, ...]:
        """Measure a cohort of clients that hold k' experts in every layer, the worst case as in ``calibrate``."""
        key = like.lora_rank, like.top_k, clients
        if key not in self._measured:
            costs, few_LE = self.costs(like.lora_rank), first_experts(self.adapter, like.top_k)
            submodel = SubModel(few_LE, few_LE, top_k=like.top_k, lora_rank=costs.lora_rank)
            found = [_stage_peaks(self, [submodel] * clients, batch) for batch in self.batches]
            peaks = [max(stage) for stage in zip(*found, strict=True)]
            self._measured[key] = transients_of(Share(costs, few_LE, few_LE, like.top_k), clients, peaks)
        return self._measured[key]


def _stage_peaks(meter: CohortMeter, submodels: Sequence[SubModel], batch: Batch) -> tuple[int, ...]:
    """Peak live bytes of each stage of a cohort's step with optimizer state."""
    adapter, train, device, clients = meter.adapter, meter.train, batch.tokens_SN.device, len(submodels)
    cohort = adapter.become_cohort(meter.params, submodels, tokens=batch.tokens_SN.numel(), joined=lambda client: None)
    prior = even_prior(adapter, train, device)
    stepper = CohortStepper(
        cohort, train, seeds=range(clients), log_priors=None if prior is None else [prior] * clients
    )
    stepper.step([batch] * clients)  # optimizer state exists from here on
    resident = stepper.resident_bytes()
    layers = cohort.layers
    with ExitStack() as hooks:
        for depth, layer in enumerate(layers):
            hooks.callback(layer.register_forward_hook(stage_marker(f"stage{len(layers) - depth}", device)).remove)
        _, trace = trace_memory(partial(stepper.step, [batch] * clients), device)
    if len(trace.phases) == 1:
        return (resident + trace.peak,)
    names = ["start", *(f"stage{done}" for done in range(1, len(layers) + 1))]
    return tuple(resident + trace.phases[name] for name in names)
