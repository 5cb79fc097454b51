"""Importance of experts to one client, from sums that one pass over its data leaves behind (HFedMoE eqs. 3-5, 10-16).

Sums are float64 numpy arrays over (L MoE layers, E experts), taken over the B tokens of ``tokens_L``; G_e is the full,
unmasked softmax of the router. Every score reads only sums, so it is the same however the tokens were batched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, get_args

import numpy as np

from fedmoe_core.messages.profile import ClientProfile

Score = Literal["s", "ib", "taylor", "reap", "reap_sum"]
OF_ROWS: Mapping[str, str] = {"taylor": "taylor_abs_LE", "reap": "reap_sum_LE", "reap_sum": "reap_sum_LE"}
"""Scores that are measured on the rows of held experts in training, and the profile's sums that they are read from."""


def cumulative(prob_sum_LE: np.ndarray, tokens_L: np.ndarray) -> np.ndarray:
    """Return the mean router probability, s_cumul(e) = (1/B) sum_i G_e(x_i): HFedMoE eq. 3 [N]. Zero without tokens."""
    return prob_sum_LE / np.maximum(tokens_L, 1)[:, None]


def specific(prob_max_LE: np.ndarray) -> np.ndarray:
    """Return the largest router probability, max_i G_e(x_i): HFedMoE eq. 4 [N]; it keeps rare, decisive experts."""
    return np.asarray(prob_max_LE, dtype=np.float64)


def importance_s(prob_sum_LE: np.ndarray, prob_max_LE: np.ndarray, tokens_L: np.ndarray, *, lam: float) -> np.ndarray:
    """Return s(e) = lambda * s_cumul(e) + (1 - lambda) * s_specific(e), in [0, 1]: HFedMoE eq. 5 [N].

    Raises:
        ValueError: lambda outside [0, 1].
    """
    if not 0 <= lam <= 1:
        raise ValueError(f"lam={lam} is outside [0, 1]; it weighs the mean against the largest router probability")
    return lam * cumulative(prob_sum_LE, tokens_L) + (1 - lam) * specific(prob_max_LE)


def kl_terms(prob_sum_LE: np.ndarray, plogp_sum_LE: np.ndarray, tokens_L: np.ndarray) -> np.ndarray:
    """Return (1/B) sum_i G_e(x_i) log(G_e(x_i) / p_e), p_e = (1/B) sum_j G_e(x_j), nats: HFedMoE eqs. 10, 11 [N].

    From sums: (1/B) sum_i G log G - p_e log p_e. Each term is at least 0 (log-sum inequality) and their sum over the
    experts of a layer is I(router; input), exactly [D].
    """
    p_LE = cumulative(prob_sum_LE, tokens_L)
    p_log_p_LE = p_LE * np.log(np.where(p_LE > 0, p_LE, 1.0))
    # The two parts cancel where a router is nearly constant; rounding may leave -1e-17 of a quantity that is >= 0.
    return np.maximum(cumulative(plogp_sum_LE, tokens_L) - p_log_p_LE, 0.0)


def information_bottleneck(s_LE: np.ndarray, kl_LE: np.ndarray, *, beta: float) -> np.ndarray:
    """Return I(e) = s(e) - beta * KL(e), the computable lower bound of eqs. 6-9: HFedMoE eqs. 12-14 [N].

    Units mix (s in [0, 1], KL in nats), as in the paper. Measured here: KL alone correlates positively with true
    importance, and beta >= 2 is worse than no penalty.
    """
    return s_LE - beta * kl_LE


def taylor(taylor_abs_LE: np.ndarray, kl_LE: np.ndarray, tokens_L: np.ndarray, *, beta: float) -> np.ndarray:
    """Return the contribution to the loss: T_e / sum_e' T_e' - beta * KL_e / log B, per layer [E].

    T_e = sum_i |G_e(x_i) dL/dG_e(x_i)| is the first-order change of the loss when expert e is taken out, the abstract's
    "contribution to fine-tuning". Division by log B puts the penalty into [0, p_e]. A layer whose T is all zero (no
    backward pass yet) scores 0 before the penalty.
    """
    relative_LE = of_layer(taylor_abs_LE)
    # One token carries no information about the input, so its KL is 0 and any divisor will do.
    log_tokens_L1 = np.log(np.maximum(tokens_L, 2))[:, None]
    return relative_LE - beta * kl_LE / log_tokens_L1


def of_layer(worth_LE: np.ndarray) -> np.ndarray:
    """Return each expert's share of its layer's worth; 0 in a layer that is worth nothing.

    Sums of one layer compare; those of two do not, as outputs and gradients differ in size from layer to layer [E].
    """
    return _ratio(worth_LE, worth_LE.sum(axis=1, keepdims=True), 0.0)


def reap(reap_sum_LE: np.ndarray, rows_LE: np.ndarray) -> np.ndarray:
    """Return the mean over an expert's rows of g_e(x) ||f_e(x)||: REAP, arXiv 2510.13999 [N]. Zero without a row."""
    return _ratio(reap_sum_LE, rows_LE, 0.0)


def usage(prob_sum_LE: np.ndarray, samples_L: np.ndarray) -> np.ndarray:
    """Return u_c(e) = (1/|D_c|) sum over D_c of G_e(x): HFedMoE eq. 16 [N]; over tokens for sequence models."""
    return cumulative(prob_sum_LE, samples_L)


def expert_scores(sums: ClientProfile, score: Score, *, lam: float, beta: float) -> np.ndarray:
    """Return the score (L, E) to maximise: ``s`` eq. 5, ``ib`` eq. 14, ``taylor`` [E], ``reap`` [N]; larger is better.

    ``reap`` and ``reap_sum``, REAP's mean over the expert's rows and the sum of the same terms, come as shares of their
    layer, because a plan compares layers [E]; lambda and beta do not touch them.
    """
    if score in ("reap", "reap_sum"):
        return of_layer(reap(sums.reap_sum_LE, sums.rows_LE) if score == "reap" else sums.reap_sum_LE)
    kl_LE = kl_terms(sums.prob_sum_LE, sums.plogp_sum_LE, sums.tokens_L)
    if score == "taylor":
        return taylor(sums.taylor_abs_LE, kl_LE, sums.tokens_L, beta=beta)
    s_LE = importance_s(sums.prob_sum_LE, sums.prob_max_LE, sums.tokens_L, lam=lam)
    if score == "s":
        return s_LE
    if score == "ib":
        return information_bottleneck(s_LE, kl_LE, beta=beta)
    raise ValueError(f"score {score!r} is unknown; choose one of {', '.join(get_args(Score))}")


def client_scores(
    profiles: Sequence[ClientProfile | None],
    prior: ClientProfile,
    score: Score,
    *,
    lam: float,
    beta: float,
    pooled: bool = True,
) -> list[np.ndarray]:
    """Return ``expert_scores`` of every client, (L, E) each; what is measured by row covers absent experts too.

    Args:
        profiles: the latest of each client; None = not heard yet.
        prior: the server's own pass over public data, which stands in for those.
        score, lam, beta: as ``expert_scores``.
        pooled: whether others' sums help to value the experts that a client lacks. Not in a private run: a plan
            would tell a client what others measured, and through what it then trains all who see the model.
    """
    known = [prior if profile is None else profile for profile in profiles]
    if (name := OF_ROWS.get(score)) is not None:
        heard = [profile is not None for profile in profiles]
        for one in [slice(None)] if pooled else [slice(client, client + 1) for client in range(len(known))]:
            known[one] = with_absent_experts(known[one], prior, heard_C=np.array(heard[one]), name=name)
    return [expert_scores(profile, score, lam=lam, beta=beta) for profile in known]


def with_absent_experts(
    profiles: Sequence[ClientProfile], prior: ClientProfile, *, heard_C: np.ndarray, name: str = "taylor_abs_LE"
) -> list[ClientProfile]:
    """Return profiles whose sums ``name`` cover absent experts too: own demand x what a served row is worth [E].

    A compact client sends all its tokens to the few experts it holds, which inflates their sums; what it measures well
    is the value of a row. So demand is the hits of the unmasked top-k, and the worth of a hit is the sum per row.
    That is the client's own where it held the expert, else pooled over all clients and the server's pass over public
    data. Their ``rows_LE`` are that demand.
    """
    demand_CLE = np.stack([profile.hits_LE for profile in profiles])
    worth_CLE = np.stack([getattr(profile, name) / np.maximum(profile.rows_LE, 1) for profile in profiles])
    measured_CLE = np.stack([profile.rows_LE > 0 for profile in profiles]) & heard_C[:, None, None]
    filled_CLE = estimate_absent(
        worth_CLE * demand_CLE,
        demand_CLE,
        measured_CLE,
        prior_taylor_LE=getattr(prior, name),
        prior_prob_sum_LE=prior.rows_LE,
    )
    found = zip(profiles, filled_CLE, strict=True)
    return [replace(profile, **{name: sum_LE, "rows_LE": profile.hits_LE}) for profile, sum_LE in found]


def estimate_absent(
    taylor_CLE: np.ndarray,
    prob_sum_CLE: np.ndarray,
    held_CLE: np.ndarray,
    *,
    prior_taylor_LE: np.ndarray,
    prior_prob_sum_LE: np.ndarray,
) -> np.ndarray:
    """Fill absent experts into the Taylor sums of every client: own demand x what a unit of demand is worth [E].

    A client cannot measure T_e of an expert that it does not hold, but its full router tells how much it would use it.
    The worth of a unit of demand, T_e / sum_i G_e(x_i), is pooled over the clients that hold e; where none does, over
    the layer's held experts, and where that is empty too, it is 1 in every layer (demand alone decides).

    Args:
        taylor_CLE: sum of |G dL/dG|, meaningful where held.
        prob_sum_CLE: sum of G_e over the client's tokens, for all experts.
        held_CLE: bool.
        prior_taylor_LE, prior_prob_sum_LE: the server's own pass over public data, which counts as one more client.

    Returns:
        (C, L, E): measured values where held, estimates elsewhere.
    """
    worth_LE = np.where(held_CLE, taylor_CLE, 0.0).sum(axis=0) + prior_taylor_LE
    demand_LE = np.where(held_CLE, prob_sum_CLE, 0.0).sum(axis=0) + prior_prob_sum_LE
    pooled_L1 = _ratio(worth_LE.sum(axis=1, keepdims=True), demand_LE.sum(axis=1, keepdims=True), 1.0)
    rate_LE = _ratio(worth_LE, demand_LE, pooled_L1)
    return np.where(held_CLE, taylor_CLE, prob_sum_CLE * rate_LE)


def _ratio(top: np.ndarray, bottom: np.ndarray, otherwise: np.ndarray | float) -> np.ndarray:
    """top / bottom, and ``otherwise`` where bottom is 0."""
    return np.where(bottom > 0, top / np.where(bottom > 0, bottom, 1.0), otherwise)
