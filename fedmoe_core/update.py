"""What a client returns after a round: deltas by key, weights, statistics and real cost."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedmoe_core.budget import Cost

# Kinds of tensors in global coordinates. "expert" and "router" tensors have experts on dimension 0; "frozen" ones (base
# experts under adapters, the blocks that adapters are grafted on) never train in this run.
Kind = Literal["expert", "router", "dense", "frozen"]


@dataclass(frozen=True)
class ParamSpec:
    """One tensor of the global model.

    ``moe.{l}.w_in`` (E, 2I, H) and ``moe.{l}.w_out`` (E, H, I) are "expert", ``moe.{l}.router`` (E, H) is "router".
    ``dense.{name}`` is everything else (trunk and head), under the model's own parameter names.
    """

    key: str
    kind: Kind
    shape: tuple[int, ...]
    dtype: torch.dtype
    layer: int = -1  # index of the MoE layer, -1 for dense tensors


@dataclass(frozen=True)
class Evaluation:
    """Sums over evaluated batches; divide by ``count``."""

    loss_sum: float  # nats
    count: int  # predicted tokens, or samples
    correct: int = 0


@dataclass(frozen=True)
class ExpertFeedback:
    """Loss and accuracy of tokens sent to each expert: sums over (place, choice) pairs, (L, E); divide by ``rows_LE``.

    Attributes:
        rows_LE: pairs whose place predicts something. Choices count at the expert chosen, also where another serves it.
        loss_LE: sum of the place's loss (see ``PlaceLosses``), in nats.
        correct_LE: how many of those predictions are right.
    """

    rows_LE: np.ndarray
    loss_LE: np.ndarray
    correct_LE: np.ndarray


@dataclass(frozen=True)
class ClientProfile:
    """What one client saw of the router and of its experts in one round, in global coordinates (numpy float64).

    Router sums run over the full, unmasked softmax G, so that demand for absent experts stays visible.

    Attributes:
        tokens_L: tokens seen by each layer (padding excluded).
        hits_LE: unmasked top-k hits.
        prob_sum_LE: sum of G_e.
        prob_max_LE: max of G_e.
        plogp_sum_LE: sum of G_e log G_e (0 log 0 = 0).
        lost_mass_L: sum over tokens of the mass of G on absent experts.
        rows_LE: rows that each held expert processed; 0 where absent.
        taylor_LE, taylor_abs_LE, fisher_LE, grad_sq_LE: importance sums (see fedmoe_kernels.ExpertScores).
        held_LE: experts the client held (the importance sums mean nothing elsewhere).
    """

    tokens_L: np.ndarray
    hits_LE: np.ndarray
    prob_sum_LE: np.ndarray
    prob_max_LE: np.ndarray
    plogp_sum_LE: np.ndarray
    lost_mass_L: np.ndarray
    rows_LE: np.ndarray
    taylor_LE: np.ndarray
    taylor_abs_LE: np.ndarray
    fisher_LE: np.ndarray
    grad_sq_LE: np.ndarray
    held_LE: np.ndarray


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


def profile_arrays(profile: ClientProfile) -> dict[str, np.ndarray]:
    """Return the profile's arrays by field name."""
    return {f.name: getattr(profile, f.name) for f in fields(profile)}
