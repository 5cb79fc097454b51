"""What a client returns after a round: deltas by key, weights, statistics and real cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from torch import Tensor

from fedmoe_core.budget.limits import NOTHING, Cost
from fedmoe_core.messages.plan import ExpertPlan
from fedmoe_core.messages.profile import ClientProfile
from fedmoe_core.messages.result import LocalFailure, LocalResult
from fedmoe_core.model.spec import Evaluation

LONGEST_REASON = 300  # characters; keys and error texts come from the client and may be of any length


@dataclass(frozen=True)
class Traffic:
    """Bytes of one client's messages in a round, as they were on the wire."""

    down: int
    up: int


@dataclass(frozen=True)
class ClientUpdate:
    """A client's answer: a value, nothing in it is mutated after it is made.

    Attributes:
        client, round: which client answers, and in which round.
        plan_id: ``ExpertPlan.id`` of the plan that it answers; an answer to another plan is refused, so is a replay.
        deltas: new minus old. "expert" and "router" keys hold only the rows of the experts trainable in the plan,
            ascending expert id, shape (Bt, ...); "dense" keys hold the whole tensor. Keys absent here did not train.
        expert_weight_LE: aggregation weight of each expert, in [0, 1]; 0 where it must not count.
        router_weight_LE: aggregation weight of each router row, in [0, 1].
        gate_weight: this client's weight as a whole in the gate's mean (alpha before normalisation), in [0, 1].
        sample_weight: |D_c| divided by the largest |D_c| of the population, in (0, 1].
        profile: router and importance sums of the round; None when the client failed before measuring.
        cost: what the round really cost.
        samples: |D_c|.
        loss_first, loss_last: mean loss of the first and of the last local step (nats).
        status: "ok"; "failed" by the client, or "refused" by the server, or "late", with the reason in ``error``.
        steps: optimizer steps taken.
        validation, validation_profile: of the trained sub-model on the client's validation data; None where the plan
            did not ask.
        private: small tensors that the server simulation keeps for this client and never aggregates (a local gate);
            ``ServerState.memory`` is where they go.
        metrics: numbers of the algorithm's own about this client and round.
        cohort: clients that trained at once with it, itself included; its ``cost.memory_bytes`` is then the prediction.
        alone: why it trained by itself though cohorts were asked for.
        wire: bytes that really travelled, counted by the server; None in a simulation, where nothing travels.
    """

    client: int
    round: int
    plan_id: str
    deltas: dict[str, Tensor]
    expert_weight_LE: np.ndarray
    router_weight_LE: np.ndarray
    gate_weight: float
    sample_weight: float
    profile: ClientProfile | None
    cost: Cost
    samples: int
    loss_first: float = float("nan")
    loss_last: float = float("nan")
    status: Literal["ok", "failed", "refused", "late"] = "ok"
    error: str = ""
    steps: int = 0
    validation: Evaluation | None = None
    validation_profile: ClientProfile | None = None
    private: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    cohort: int = 1
    alone: str = ""
    wire: Traffic | None = None


@dataclass(frozen=True)
class Weights:
    """What an algorithm makes of a client's result: how much each part of it counts, and what goes back beside it.

    Attributes:
        experts_LE, routers_LE, gate: the ``expert_weight_LE``, ``router_weight_LE`` and ``gate_weight`` of the update.
        deltas: instead of the result's own, where the algorithm recasts them; None = as they are.
        private, metrics: as ``ClientUpdate``. The plan's surcharge pays for private tensors that really travel.
    """

    experts_LE: np.ndarray
    routers_LE: np.ndarray
    gate: float = 0.0
    deltas: dict[str, Tensor] | None = None
    private: Mapping[str, Tensor] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


def finished_update(
    plan: ExpertPlan, result: LocalResult, weights: Weights, *, samples: int, sample_weight: float
) -> ClientUpdate:
    """Make the answer of a client that trained: its deltas, profile and cost under an algorithm's weights.

    Args:
        plan, result, weights: what was asked, what came of it, and how much that counts.
        samples, sample_weight: as ``ClientUpdate``.
    """
    return ClientUpdate(
        client=plan.client,
        round=plan.round,
        plan_id=plan.id,
        deltas=result.deltas if weights.deltas is None else weights.deltas,
        expert_weight_LE=np.asarray(weights.experts_LE, np.float64),
        router_weight_LE=np.asarray(weights.routers_LE, np.float64),
        gate_weight=float(weights.gate),
        sample_weight=sample_weight,
        profile=result.profile,
        cost=result.cost,
        samples=samples,
        loss_first=result.losses[0] if result.losses else float("nan"),
        loss_last=result.losses[-1] if result.losses else float("nan"),
        steps=len(result.losses),
        validation=result.validation,
        validation_profile=result.validation_profile,
        private={name: tensor.detach().cpu().clone() for name, tensor in weights.private.items()},
        metrics={name: float(value) for name, value in weights.metrics.items()},
    )


def failed_update(plan: ExpertPlan, failure: LocalFailure, *, sample_weight: float) -> ClientUpdate:
    """Make the report of a client whose round failed: nothing to aggregate, the reason, and what it still cost."""
    return blank(plan, failure.error, status="failed", cost=failure.cost, sample_weight=sample_weight)


def blank(
    plan: ExpertPlan,
    reason: str,
    *,
    status: Literal["failed", "refused", "late"] = "refused",
    cost: Cost = NOTHING,
    sample_weight: float = 0.0,
) -> ClientUpdate:
    """Make the record of an answer of which nothing may enter the model or the server's memory."""
    nothing_LE = np.zeros(plan.trainable_LE.shape)
    return ClientUpdate(
        client=plan.client,
        round=plan.round,
        plan_id=plan.id,
        deltas={},
        expert_weight_LE=nothing_LE,
        router_weight_LE=nothing_LE,
        gate_weight=0.0,
        sample_weight=sample_weight,
        profile=None,
        cost=cost,
        samples=0,
        status=status,
        error=reason[:LONGEST_REASON],
    )


def refused(
    update: ClientUpdate, plan: ExpertPlan, reason: str, *, status: Literal["refused", "late"] = "refused"
) -> ClientUpdate:
    """Return the report of an update that the server did not take: nothing of it could enter the model or its memory.

    It stands under the client and round of ``plan``, whatever the update claims.
    """
    nothing_LE = np.zeros(plan.trainable_LE.shape)
    return replace(
        update,
        client=plan.client,
        round=plan.round,
        plan_id=plan.id,
        deltas={},
        expert_weight_LE=nothing_LE,
        router_weight_LE=nothing_LE,
        gate_weight=0.0,
        profile=None,
        validation=None,
        validation_profile=None,
        private={},
        metrics={},
        status=status,
        error=reason,
    )
