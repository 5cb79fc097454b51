"""What a client returns after a round: deltas by key, weights, statistics and real cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from torch import Tensor

from fedmoe_core.budget.limits import Cost
from fedmoe_core.budget.peak_memory import tensor_bytes
from fedmoe_core.messages.plan import ExpertPlan
from fedmoe_core.messages.profile import ClientProfile
from fedmoe_core.messages.result import LocalResult
from fedmoe_core.model.spec import Evaluation


@dataclass(frozen=True)
class ClientUpdate:
    """A client's answer: a value, nothing in it is mutated after it is made.

    Attributes:
        client, round: which client answers, and in which round.
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
        status: "ok"; "failed" by the client or "refused" by the server, with the reason in ``error``.
        steps: optimizer steps taken.
        validation, validation_profile: of the trained sub-model on the client's validation data; None where the plan
            did not ask.
        private: small tensors that the server simulation keeps for this client and never aggregates (a local gate);
            ``ServerState.memory`` is where they go.
        metrics: numbers of the algorithm's own about this client and round.
    """

    client: int
    round: int
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
    status: Literal["ok", "failed", "refused"] = "ok"
    error: str = ""
    steps: int = 0
    validation: Evaluation | None = None
    validation_profile: ClientProfile | None = None
    private: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


def finished_update(
    plan: ExpertPlan,
    result: LocalResult,
    *,
    samples: int,
    sample_weight: float,
    expert_weight_LE: np.ndarray,
    router_weight_LE: np.ndarray,
    gate_weight: float,
    deltas: dict[str, Tensor] | None = None,
    private: Mapping[str, Tensor] | None = None,
    private_travels: bool = False,
    metrics: Mapping[str, float] | None = None,
) -> ClientUpdate:
    """Make the answer of a client that trained: its deltas, profile and cost under an algorithm's weights.

    Args:
        plan, result: what was asked and what came of it.
        samples, sample_weight, expert_weight_LE, router_weight_LE, gate_weight: as ``ClientUpdate``.
        deltas: instead of the result's own, where the algorithm recasts them; None = as they are.
        private, metrics: as ``ClientUpdate``.
        private_travels: whether the private tensors really go to the server, so that their bytes are charged; the plan
            must then leave room for them (``surcharge=Cost(bytes_up=...)`` charges and predicts them in one).
    """
    private = {name: tensor.detach().cpu().clone() for name, tensor in (private or {}).items()}
    sent = Cost(bytes_up=tensor_bytes(private.values()) if private_travels else 0)
    return ClientUpdate(
        client=plan.client,
        round=plan.round,
        deltas=result.deltas if deltas is None else deltas,
        expert_weight_LE=expert_weight_LE,
        router_weight_LE=router_weight_LE,
        gate_weight=gate_weight,
        sample_weight=sample_weight,
        profile=result.profile,
        cost=result.cost.with_extra(sent),
        samples=samples,
        loss_first=result.losses[0] if result.losses else float("nan"),
        loss_last=result.losses[-1] if result.losses else float("nan"),
        steps=len(result.losses),
        validation=result.validation,
        validation_profile=result.validation_profile,
        private=private,
        metrics={name: float(value) for name, value in (metrics or {}).items()},
    )


def failed_update(plan: ExpertPlan, result: LocalResult, sample_weight: float) -> ClientUpdate:
    """Make the report of a client whose round failed: nothing to aggregate, the reason, and what it still cost."""
    nothing_LE = np.zeros(plan.trainable_LE.shape)
    return ClientUpdate(
        client=plan.client,
        round=plan.round,
        deltas={},
        expert_weight_LE=nothing_LE,
        router_weight_LE=nothing_LE,
        gate_weight=0.0,
        sample_weight=sample_weight,
        profile=None,
        cost=result.cost,
        samples=0,
        status="failed",
        error=result.error,
    )


def refused(update: ClientUpdate, reason: str) -> ClientUpdate:
    """Return the same report with nothing in it that could enter the model or the server's memory."""
    return replace(
        update,
        deltas={},
        expert_weight_LE=np.zeros_like(update.expert_weight_LE),
        router_weight_LE=np.zeros_like(update.router_weight_LE),
        gate_weight=0.0,
        profile=None,
        validation=None,
        validation_profile=None,
        private={},
        metrics={},
        status="refused",
        error=reason,
    )
