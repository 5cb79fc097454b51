"""What a client's round came to: what training gave for an algorithm to read, or why it failed and what it cost."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from fedmoe_core.budget.limits import Cost
from fedmoe_core.messages.profile import ClientProfile, ExpertFeedback
from fedmoe_core.model.spec import Evaluation


@dataclass(frozen=True)
class LocalResult:
    """What local training gave, before the algorithm weighs it.

    Attributes:
        deltas: new minus old, keyed and shaped as ``ClientUpdate.deltas``.
        profile: router and importance sums over the round's batches.
        cost: measured, and the plan's surcharge.
        losses: mean loss of each local step, in nats.
        extract_seconds: time spent cutting the sub-model out of the global one, not training it.
        kept: trained rows (not deltas) of what the plan keeps on the client and of adapters that the state does not
            have, keyed and shaped as ``deltas``; ``moe.{l}.out_scale`` where the plan asked for it.
        probed: what the plan's probes answered.
        validation, validation_profile: of the trained sub-model on the client's validation data, where the plan asks
            for it; rows are those of the sub-model's own choices, importance is 0.
        feedback: how the places of that data fare by chosen expert; what of it travels, the algorithm declares.
        trained_LE: experts that learnt from some batch: the plan's trainable ones, unless every batch had its own. The
            others of the plan have deltas of zero, which are not sent.
    """

    deltas: dict[str, Tensor]
    profile: ClientProfile
    cost: Cost
    losses: tuple[float, ...]
    extract_seconds: float = 0.0
    kept: dict[str, Tensor] = field(default_factory=dict)
    probed: dict[str, Tensor] = field(default_factory=dict)
    validation: Evaluation | None = None
    validation_profile: ClientProfile | None = None
    feedback: ExpertFeedback | None = None
    trained_LE: np.ndarray | None = None


@dataclass(frozen=True)
class LocalFailure:
    """A round that ended early: a loss was not finite, or the step raised.

    Attributes:
        cost: what it used until then, and the plan's surcharge.
        error: why, in one sentence.
        extract_seconds: as ``LocalResult``.
    """

    cost: Cost
    error: str
    extract_seconds: float = 0.0
