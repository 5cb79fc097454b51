"""Dry steps of two small cohorts: what the closed forms cannot know about many clients over one trunk."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch

from fedmoe_core.budget.cohort_memory import CohortCosts, Share
from fedmoe_core.budget.cost_model import CostModel
from fedmoe_core.budget.peak_memory import trace_memory
from fedmoe_core.client.cohort.step import CohortStepper
from fedmoe_core.config.run_config import TrainConfig
from fedmoe_core.data.batches import Batch
from fedmoe_core.model.cohort import CohortAdapter
from fedmoe_core.model.submodel import SubModel
from fedmoe_core.simulation.calibrate import NEVER, even_prior, first_experts, stage_marker

SIZES = (2, 6)  # clients of the two; from two points comes a line, and the farther apart the less an error grows


def calibrate_cohorts(
    adapter: CohortAdapter,
    params: dict[str, torch.Tensor],
    train: TrainConfig,
    batch: Batch,
    *,
    costs: CostModel,
    padding: bool,
) -> CohortCosts:
    """Measure cohorts of clients that hold k' experts in every layer, for each k' from 1 to the model's k.

    Args:
        adapter, params, train, batch, padding: as ``calibrate``.
        costs: the cost model of one client, measured.
    """
    train = replace(train, token_dropout=min(train.token_dropout, NEVER))
    whole_SN = torch.ones_like(batch.mask_SN)
    padded_SN = whole_SN.clone()
    padded_SN[0, -1] = False
    batches = [replace(batch, mask_SN=mask_SN) for mask_SN in (whole_SN, padded_SN)[: 1 + padding]]
    peaks: dict[int, dict[int, tuple[int, ...]]] = {}
    shares = {}
    for top_k in range(1, adapter.spec.top_k + 1):
        few_LE = first_experts(adapter, top_k)
        shares[top_k] = Share(costs, few_LE, few_LE, top_k)
        submodel = SubModel(few_LE, few_LE, top_k=top_k, lora_rank=costs.lora_rank)
        peaks[top_k] = {}
        for clients in SIZES:
            found = [_stage_peaks(adapter, params, train, [submodel] * clients, each) for each in batches]
            peaks[top_k][clients] = tuple(max(stage) for stage in zip(*found, strict=True))
    return CohortCosts.measured(peaks, shares)


def _stage_peaks(
    adapter: CohortAdapter,
    params: dict[str, torch.Tensor],
    train: TrainConfig,
    submodels: Sequence[SubModel],
    batch: Batch,
) -> tuple[int, ...]:
    """Peak live bytes of each stage of a cohort's step with optimizer state."""
    device, clients = batch.tokens_SN.device, len(submodels)
    cohort = adapter.become_cohort(params, submodels, tokens=batch.tokens_SN.numel(), joined=lambda client: None)
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
