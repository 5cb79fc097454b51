"""What the clients of a cohort do after the last step: validate in joint forwards, then measure, each alone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fedmoe_core.budget.peak_memory import resident_bytes, tensor_bytes, trace_memory
from fedmoe_core.client.cohort.validation import validate_cohort
from fedmoe_core.client.failures import FAILURES, reason_of
from fedmoe_core.client.profiling import NO_DATA, Validation, run_probe
from fedmoe_core.messages.plan import ProbeContext
from fedmoe_core.model.cohort import LiveCohort


@dataclass(frozen=True)
class Afterwards:
    """What one client did after its last step.

    Attributes:
        probed: what its probe answered.
        memory_bytes: the peak of that probe, as it is for a client alone; 0 without one.
        seconds: what the probe took.
        validation: of its trained sub-model; None where the plan does not ask for it.
        error: what ended its round; empty if nothing did.
    """

    probed: dict[str, Tensor]
    memory_bytes: int = 0
    seconds: float = 0.0
    validation: Validation | None = None
    error: str = ""


def validated(
    cohort: LiveCohort, contexts: Sequence[ProbeContext], alive: Sequence[bool], device: torch.device
) -> tuple[list[Validation | None], int]:
    """Validate the clients that are alive and whose plan asks for it; return what each shows and the peak in bytes.

    The peak is above what the cohort itself holds.
    """
    asked = [runs and context.plan.extras.validate for runs, context in zip(alive, contexts, strict=True)]
    if not any(asked):
        return [None] * len(contexts), 0
    batches = [list(context.validation()) if asks else [] for asks, context in zip(asked, contexts, strict=True)]
    priors = [context.log_prior_C for context in contexts if context.log_prior_C is not None]
    found, trace = trace_memory(partial(validate_cohort, cohort, batches, log_priors=priors or None), device)
    return found, trace.peak


def measured(
    cohort: LiveCohort, client: int, context: ProbeContext, validation: Validation | None, device: torch.device
) -> tuple[Afterwards, int]:
    """Run the probe that a client's plan asks for after training, on its sub-model alone; the cohort is over then.

    Returns:
        What the client did, and the peak of the process in bytes; 0 without a probe.
    """
    extras = context.plan.extras
    if extras.validate and validation is None:
        return Afterwards({}, error=f"ValueError: {NO_DATA}"), 0
    if extras.after is None:
        return Afterwards({}, validation=validation), 0
    began = time.perf_counter()
    cohort.become_alone(client)
    alone = resident_bytes(context.adapter.model)
    others = tensor_bytes(cohort.resident()) - alone
    try:
        answer, used = run_probe(extras.after, context, device)
    except FAILURES as error:
        spent = time.perf_counter() - began
        return Afterwards({}, alone, spent, error=reason_of(error)), others + alone
    return Afterwards(answer, used, time.perf_counter() - began, validation), others + used
