"""Local training of one client: a compact sub-model, a few optimizer steps, and what they cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from fedmoe_core.budget.cost_model import CostModel
from fedmoe_core.budget.limits import Cost
from fedmoe_core.budget.peak_memory import resident_bytes, tensor_bytes, trace_memory
from fedmoe_core.client.failures import FAILURES, reason_of
from fedmoe_core.client.per_batch import PerBatchSteps
from fedmoe_core.client.profiling import ProfileSums, run_probe, statistics_bytes, validate
from fedmoe_core.client.step import LocalSteps, PlainSteps, Stepper, log_prior
from fedmoe_core.client.traffic import read_off, received_bytes, returned_bytes
from fedmoe_core.config.run_config import TrainConfig
from fedmoe_core.data.batches import Batch
from fedmoe_core.messages.plan import Batches, ExpertPlan, ProbeContext
from fedmoe_core.messages.result import LocalFailure, LocalResult
from fedmoe_core.model.adapter import ModelAdapter

T = TypeVar("T")


def train_client(
    adapter: ModelAdapter,
    params: dict[str, Tensor],
    plan: ExpertPlan,
    batches: Iterable[Batch],
    *,
    train: TrainConfig,
    costs: CostModel,
    class_shares_C: np.ndarray | None = None,
    redraw: Batches = tuple,
    validation: Batches = tuple,
) -> LocalResult | LocalFailure:
    """Run one client's round inside its plan.

    Args:
        adapter: the live model; re-configured here, so nothing of an earlier client stays.
        params: the global model, read only.
        plan: the experts, the steps and the FLOP bound.
        batches: at least ``plan.local_steps`` batches.
        train: optimizer settings; ``lr`` is this round's.
        costs: counts the FLOPs of the rows that really ran.
        class_shares_C: the client's class shares, for logit adjustment; None in language modelling.
        redraw: ``batches`` from the start, for probes.
        validation: all of the client's validation data.

    Returns:
        The result; or a failure, where a loss is not finite or a step raised: one client's trouble never ends the run.
    """
    began = time.perf_counter()
    prior_C = log_prior(class_shares_C, train, next(adapter.model.parameters()).device)
    context = ProbeContext(adapter, params, plan, train, redraw, validation, prior_C)
    # Until the tensors that were sent have been counted, the prediction stands for them.
    sent = plan.predicted.bytes_down - plan.extras.surcharge.bytes_down
    meter = _Meter(bytes_down=sent, experts=plan.counted_experts + costs.base_experts)
    try:
        return _train(context, batches, meter, costs=costs)
    except FAILURES as error:
        cost = Cost(
            memory_bytes=max(meter.memory_bytes, resident_bytes(adapter.model)),
            flops=meter.flops(),
            bytes_down=meter.bytes_down,
            experts=meter.experts,
            seconds=time.perf_counter() - began,
        )
        return LocalFailure(cost.with_extra(plan.extras.surcharge), reason_of(error))


@dataclass
class _Meter:
    """What a client has used so far: a round that fails is charged for it too.

    Attributes:
        memory_bytes: largest so far.
        bytes_down, experts: as in ``Cost``.
        flops: counts them when asked, because counting waits for the device.
    """

    memory_bytes: int = 0
    bytes_down: int = 0
    experts: int = 0
    flops: Callable[[], float] = lambda: 0.0

    def run(self, step: Callable[[], T], device: torch.device, *, resident: int) -> T:
        """Run ``step`` and count its peak above ``resident`` bytes, even where it raises."""
        failures: list[BaseException] = []

        def attempt() -> T | None:
            try:
                return step()
            except FAILURES as error:
                failures.append(error)
                return None

        result, trace = trace_memory(attempt, device)
        self.memory_bytes = max(self.memory_bytes, resident + trace.peak)
        if failures:
            raise failures[0]
        return cast(T, result)


def _train(context: ProbeContext, batches: Iterable[Batch], meter: _Meter, *, costs: CostModel) -> LocalResult:
    """Become the sub-model, measure what the plan asks, train, and read off what changed and what it cost."""
    began = time.perf_counter()
    adapter, plan, train = context.adapter, context.plan, context.train
    device = next(adapter.model.parameters()).device
    probed, meter.memory_bytes = run_probe(plan.extras.before, context, device, afresh=True)
    extracting = time.perf_counter()
    adapter.configure(context.params, plan.submodel(train_dense=train.trunk == "fedavg"))
    extracted = time.perf_counter()
    meter.bytes_down = received_bytes(adapter, plan)
    meter.memory_bytes = max(meter.memory_bytes, resident_bytes(adapter.model))

    sums = ProfileSums(adapter)
    rule = plan.extras.per_batch
    steps = PlainSteps(context, costs, sums) if rule is None else PerBatchSteps(context, costs, sums, rule)
    losses = _run_steps(
        context, batches, meter, steps, sums, worst=costs.step_flops(plan.served_LE, plan.taught_LE, top_k=plan.top_k)
    )
    trained_LE = steps.finish()

    returned = read_off(adapter.trained(), context.params, plan)
    profile = sums.finish()
    flops, meter.bytes_down = steps.spent(), received_bytes(adapter, plan)  # choices per batch change what it holds
    answer, peak = run_probe(plan.extras.after, context, device)
    found = None
    if plan.extras.validate:
        resident, held_out = resident_bytes(adapter.model, steps.optimizer), list(context.validation())
        judge = partial(validate, adapter, held_out, log_prior_C=context.log_prior_C)
        found = meter.run(judge, device, resident=resident)
    sent = returned_bytes(returned.deltas, trained_LE, plan) + tensor_bytes(returned.whole)
    cost = Cost(
        memory_bytes=max(meter.memory_bytes, peak),
        flops=flops,
        bytes_down=meter.bytes_down,
        bytes_up=sent + statistics_bytes(profile),
        experts=meter.experts,
        seconds=time.perf_counter() - began,
    )
    return LocalResult(
        returned.deltas,
        profile,
        cost.with_extra(plan.extras.surcharge),
        tuple(losses),
        extract_seconds=extracted - extracting,
        kept=returned.kept,
        probed=probed | answer,
        validation=None if found is None else found.total,
        validation_profile=None if found is None else found.profile,
        feedback=None if found is None else found.feedback,
        trained_LE=trained_LE,
    )


def _run_steps(
    context: ProbeContext,
    batches: Iterable[Batch],
    meter: _Meter,
    steps: LocalSteps,
    sums: ProfileSums,
    *,
    worst: float,
) -> list[float]:
    """Train for the plan's steps, or until the next might pass its FLOP bound; return the loss of each.

    Args:
        context, batches, meter, steps, sums: the client, its data, and what counts.
        worst: the most operations that one step can need.

    Raises:
        ArithmeticError: a loss is not finite.
    """
    adapter, plan, losses, begun = context.adapter, context.plan, list[float](), 0
    device = next(adapter.model.parameters()).device
    bound = None if plan.budget.flops is None else plan.budget.flops - plan.extras.surcharge.flops

    def spent_at_most() -> float:
        """Count a step that did not end as a whole one; together never more than the plan foresaw."""
        try:
            return min(steps.spent() + (begun - len(losses)) * worst, begun * worst)
        except RuntimeError:  # the device itself failed
            return begun * worst

    meter.flops = spent_at_most
    prior_C, aux = context.log_prior_C, plan.extras.aux
    stepper = Stepper(adapter, steps.optimizer, context.train, seed=plan.seed, log_prior_C=prior_C, aux=aux)
    for step, batch in zip(range(plan.local_steps), batches, strict=False):
        # Counting rows waits for the device, so it is done at every step only where a bound may be met.
        if bound is not None and steps.spent() + worst > bound:
            break
        begun += 1
        meter.memory_bytes = max(meter.memory_bytes, steps.before(batch))
        # Every step, because padding, token dropout and the choices of experts make some larger than others (by up to
        # 0.9 % on labelled rows); a trace takes 10 ms.
        resident = resident_bytes(adapter.model, steps.optimizer) + tensor_bytes(stepper.anchors)
        losses.append(meter.run(partial(stepper.step, batch), device, resident=resident))
        sums.add_batch()
        steps.after(batch.tokens_SN.numel())
        if not np.isfinite(losses[-1]):
            raise ArithmeticError(f"the loss became {losses[-1]} at local step {step + 1}")
    return losses
