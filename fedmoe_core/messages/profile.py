"""What a client measured of its experts: router statistics, importance sums and how the tokens of each fared."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np


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
        reap_sum_LE: sum over those rows of |router weight| * ||output||; / ``rows_LE`` it is REAP (arXiv 2510.13999).
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
    reap_sum_LE: np.ndarray
    held_LE: np.ndarray


def empty_profile(layers: int, experts: int) -> ClientProfile:
    """Return what a client saw that saw nothing; with 0 layers, all that a model without MoE layers can show."""
    shapes = {f.name: (layers, experts) if f.name.endswith("_LE") else (layers,) for f in fields(ClientProfile)}
    return ClientProfile(
        **{name: np.zeros(s, dtype=bool if name == "held_LE" else float) for name, s in shapes.items()}
    )


def profile_arrays(profile: ClientProfile) -> dict[str, np.ndarray]:
    """Return the profile's arrays by field name."""
    return {f.name: getattr(profile, f.name) for f in fields(profile)}
