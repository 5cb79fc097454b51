"""What the server decides for one client in one round."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedmoe_core.budget import Budget, Cost


@dataclass(frozen=True)
class ExpertPlan:
    """One client's part in one round: its experts, its work, and what that will cost.

    Shapes: L MoE layers, E experts per layer. Masks are boolean numpy arrays in global coordinates.

    Attributes:
        client: index of the client, 0..C-1.
        round: index of the round, from 0.
        permitted_LE: experts the client may store and run.
        trainable_LE: the permitted experts that also get a weight gradient; a subset of ``permitted_LE``.
        top_k: experts per token (k'), at most the model's own k; lowered only by a FLOP budget.
        local_steps: optimizer steps; the client also stops before the step that would pass the FLOP budget.
        seed: seed of everything random on the client in this round.
        budget: the device's limits.
        predicted: what the cost model expects; inside ``budget`` in every resource, or the plan is refused.
        first_participation: whether the frozen trunk travels to the client with this plan.
    """

    client: int
    round: int
    permitted_LE: np.ndarray
    trainable_LE: np.ndarray
    top_k: int
    local_steps: int
    seed: int
    budget: Budget
    predicted: Cost
    first_participation: bool = True

    def __post_init__(self) -> None:
        if self.permitted_LE.shape != self.trainable_LE.shape:
            raise ValueError(
                f"client {self.client}: permitted_LE {self.permitted_LE.shape} and trainable_LE "
                f"{self.trainable_LE.shape} differ in shape; both must be (layers, experts)"
            )
        if (self.trainable_LE & ~self.permitted_LE).any():
            raise ValueError(f"client {self.client}: a trainable expert is not permitted; trainable must be a subset")
        empty = np.flatnonzero(~self.permitted_LE.any(axis=1))
        if empty.size:
            raise ValueError(f"client {self.client}: layer {empty[0]} has no permitted expert; permit at least one")
