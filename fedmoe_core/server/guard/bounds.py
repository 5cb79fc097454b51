"""How large a change of a part usually is: the running median of norms, and what is above a multiple of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fedmoe_core.server.guard.votes import Vote

ROUNDS = 5  # whose medians make the usual norm
# Clients of a round whose median says something: of two, either could be the hostile one.
FEWEST_CLIENTS = 3


def usual_norms(votes: Sequence[Vote], history_RG: np.ndarray | None, layers: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the usual norm of each group of parts, and the history with this round in it.

    Groups are the experts of each layer, the router rows of each layer, then the dense tensors: G = 2 L + 1. An expert
    may have one voter, and its layer has many. A client counts once in a group, by the median norm of its parts
    there, or one that holds all experts would outvote those that hold one.

    Args:
        votes: of the round, in any order.
        history_RG: medians of at most ``ROUNDS`` earlier rounds, float64, NaN where a round had too few clients; None
            before the first round.
        layers: L.

    Returns:
        (G,) float64, infinite where nothing is known yet; and the next history.
    """
    now_G = np.full(2 * layers + 1, math.nan)
    for group in range(2 * layers + 1):
        norms = [norm for vote in votes if (norm := _of_client(vote, group, layers)) > 0]
        if len(norms) >= FEWEST_CLIENTS:
            now_G[group] = np.median(norms)
    rounds = [now_G[None]] if history_RG is None else [history_RG, now_G[None]]
    history_RG = np.concatenate(rounds)[-ROUNDS:]
    known_G = ~np.isnan(history_RG).all(axis=0)
    usual_G = np.full(2 * layers + 1, math.inf)
    usual_G[known_G] = np.nanmedian(history_RG[:, known_G], axis=0)
    return usual_G, history_RG


def group_of(kind: str, layer: int, layers: int) -> int:
    """Return the group that a part belongs to."""
    return {"expert": layer, "router": layers + layer}.get(kind, 2 * layers)


def _of_client(vote: Vote, group: int, layers: int) -> float:
    """The median norm of the parts of a group that this client votes on; 0 where it votes on none."""
    if group == 2 * layers:
        return vote.dense_norm if vote.weight else 0.0
    experts = group < layers
    weight_LE = vote.expert_LE if experts else vote.router_LE
    norm_LE = vote.expert_norm_LE if experts else vote.router_norm_LE
    norms = norm_LE[group % layers][weight_LE[group % layers] > 0]
    return float(np.median(norms)) if len(norms) else 0.0
