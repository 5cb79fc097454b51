"""Local training of a cohort: several clients' sub-models in one model, a few optimizer steps, and what each costs."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import Tensor

from fedmoe_core.budget.cost_model import CostModel
from fedmoe_core.budget.limits import Cost
from fedmoe_core.budget.peak_memory import tensor_bytes, trace_memory
from fedmoe_core.client.cohort.after import Afterwards, measured, validated
from fedmoe_core.client.cohort.step import CohortStepper
from fedmoe_core.client.cohort.sums import CohortSums
from fedmoe_core.client.profiling import run_probe, statistics_bytes
from fedmoe_core.client.step import log_prior
from fedmoe_core.client.traffic import read_off, received_bytes, returned_bytes
from fedmoe_core.config.run_config import TrainConfig
from fedmoe_core.data.batches import Batch
from fedmoe_core.messages.plan import Batches, ExpertPlan, ProbeContext
from fedmoe_core.messages.result import LocalFailure, LocalResult
from fedmoe_core.model.cohort import CohortAdapter


@dataclass(frozen=True)
class Member:
    """One client of a cohort.

    Attributes:
        plan: its plan; of one kind with the others', see ``simulation.cohorts``.
        costs: the cost model of what its plan asks.
        batches: its batches, from the start at every call.
        class_shares_C: its class shares, for logit adjustment; None in language modelling.
        validation: all of its validation data.
    """

    plan: ExpertPlan
    costs: CostModel
    batches: Batches
    class_shares_C: np.ndarray | None = None
    validation: Batches = tuple


@dataclass(frozen=True, eq=False)
class TrainedCohort:
    """A cohort after its last step.

    Attributes:
        memory_bytes: the peak of the process, all clients together.
        results: each member's, in order; made when asked for, so that the deltas of two clients never exist at once.
    """

    memory_bytes: int
    results: Iterator[LocalResult | LocalFailure]


def train_cohort(
    adapter: CohortAdapter, params: dict[str, Tensor], members: Sequence[Member], *, train: TrainConfig
) -> TrainedCohort:
    """Run one round of several clients at once, each inside its plan.

    A client's own peak cannot be measured among others. So its cost has the peak that the cost model predicts for it
    alone, which is a bound from above; all other costs are counted as they are for a client alone.

    Args:
        adapter: the live model; re-configured here.
        params: the global model, read only.
        members: at least one.
        train: optimizer settings; ``lr`` is this round's.

    Raises:
        ValueError, RuntimeError: the clients do not go together, or the joint step raised. Nothing is known then about
            any single client; train each alone.
    """
    began, plans = time.perf_counter(), [member.plan for member in members]
    device = next(adapter.model.parameters()).device
    contexts = [
        ProbeContext(adapter, params, one.plan, train, one.batches, one.validation, prior)
        for one in members
        for prior in [log_prior(one.class_shares_C, train, device)]
    ]
    priors = [context.log_prior_C for context in contexts if context.log_prior_C is not None]
    probed = [run_probe(context.plan.extras.before, context, device, afresh=True) for context in contexts]
    peak = max(used for _, used in probed)
    received = [0] * len(members)

    def joined(client: int) -> None:
        received[client] = received_bytes(adapter, plans[client])

    tokens, joining = train.batch_size * train.seq_len, time.perf_counter()
    cohort = adapter.become_cohort(
        params,
        [plan.submodel(train_dense=train.trunk == "fedavg") for plan in plans],
        tokens=tokens,
        joined=joined,
    )
    extract_seconds = (time.perf_counter() - joining) / len(members)
    sums = CohortSums(cohort.layers)
    stepper = CohortStepper(
        cohort,
        train,
        seeds=[plan.seed for plan in plans],
        log_priors=priors or None,
        aux=[plan.extras.aux for plan in plans],
    )
    losses: list[list[float]] = []
    for batches in _side_by_side(members):
        resident = stepper.resident_bytes()
        found_losses, trace = trace_memory(partial(stepper.step, batches), device)
        peak = max(peak, resident + trace.peak)
        losses.append(found_losses)
        if not any(stepper.alive):
            break
        sums.add_batch()

    stepper.release()
    found, beside = validated(cohort, contexts, stepper.alive, device)
    peak = max(peak, stepper.resident_bytes() + beside)
    share = (time.perf_counter() - began) / len(members)
    after: list[Afterwards] = []
    for client, (context, validation) in enumerate(zip(contexts, found, strict=True)):
        if client in stepper.failures:
            after.append(Afterwards({}, error=stepper.failures[client]))
            continue
        did, used = measured(cohort, client, context, validation, device)
        peak = max(peak, used)
        after.append(did)

    def result(client: int) -> LocalResult | LocalFailure:
        """Read one client's result off the live cohort."""
        member, plan, did = members[client], plans[client], after[client]
        steps = len(losses)
        if client in stepper.failures:
            steps = sum(math.isfinite(step[client]) for step in losses)
        flops = (
            member.costs.real_flops(sums.rows_LE(client), plan.trainable_LE, tokens=tokens * steps) if steps else 0.0
        )
        cost = Cost(
            memory_bytes=max(_alone(member), probed[client][1], did.memory_bytes),
            flops=flops,
            bytes_down=received[client],
            experts=plan.counted_experts + member.costs.base_experts,
            seconds=share + did.seconds,
        )
        if did.error:
            return LocalFailure(cost.with_extra(plan.extras.surcharge), did.error, extract_seconds)
        trained = {each.key: view for each in cohort.learning if (view := each.of(client)) is not None}
        returned, profile = read_off(trained, params, plan), sums.finish(client)
        sent = returned_bytes(returned.deltas, plan.trainable_LE, plan) + tensor_bytes(returned.whole)
        whole = cost.with_extra(Cost(bytes_up=sent + statistics_bytes(profile)))
        return LocalResult(
            returned.deltas,
            profile,
            whole.with_extra(plan.extras.surcharge),
            tuple(step[client] for step in losses),
            extract_seconds=extract_seconds,
            kept=returned.kept,
            probed=probed[client][0] | did.probed,
            validation=None if did.validation is None else did.validation.total,
            validation_profile=None if did.validation is None else did.validation.profile,
            feedback=None if did.validation is None else did.validation.feedback,
            trained_LE=plan.trainable_LE,
        )

    return TrainedCohort(peak, map(result, range(len(members))))


def _side_by_side(members: Sequence[Member]) -> Iterator[list[Batch]]:
    """The batches of each step, one of each member."""
    drawn = [iter(member.batches()) for member in members]
    for _ in range(members[0].plan.local_steps):
        yield [next(batches) for batches in drawn]


def _alone(member: Member) -> int:
    """The peak that is predicted for a client which trains alone."""
    plan = member.plan
    return member.costs.memory(plan.permitted_LE, plan.trainable_LE, top_k=plan.top_k)
