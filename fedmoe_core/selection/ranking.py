"""Every score that can rank experts, side by side, from one pass forward and backward."""

from __future__ import annotations

import numpy as np

from fedmoe_core.messages.profile import ClientProfile
from fedmoe_core.selection.importance import cumulative, expert_scores, reap
from fedmoe_core.selection.names import RANKINGS


def all_scores(profile: ClientProfile, *, batches: int, lam: float, beta: float) -> dict[str, np.ndarray]:
    """Return the scores of ``RANKINGS`` by name, float64 (L, E) each; larger is more important.

    ``taylor``, ``reap`` and ``reap_sum`` here keep the sums' own unit; what plans maximise
    (``importance.expert_scores``) is a share of its layer.

    Args:
        profile: of the whole model, one backward per batch of that batch's mean loss in nats.
        batches: how many batches these are; the Taylor scores are in nats of a batch's mean loss.
        lam, beta: of HFedMoE eqs. 5 and 14.

    Raises:
        ValueError: no batch, or lam outside [0, 1].
    """
    if batches < 1:
        raise ValueError(f"batches={batches} leaves nothing to score by; give at least 1")
    found = {
        "taylor": profile.taylor_abs_LE / batches,
        "taylor_signed": -profile.taylor_LE / batches,
        "s": expert_scores(profile, "s", lam=lam, beta=beta),
        "ib": expert_scores(profile, "ib", lam=lam, beta=beta),
        "reap": reap(profile.reap_sum_LE, profile.rows_LE),
        "reap_sum": cumulative(profile.reap_sum_LE, profile.tokens_L),
        "frequency": cumulative(profile.hits_LE, profile.tokens_L),
    }
    return {name: found[name] for name in RANKINGS}


def ranked(score_LE: np.ndarray) -> np.ndarray:
    """Return each layer's expert ids, best first, int (L, E); of equal scores the lower id comes first.

    Example:
        >>> ranked(np.array([[0.1, 0.5, 0.5]]))
        array([[1, 2, 0]])
    """
    return np.argsort(-score_LE, axis=1, kind="stable")
