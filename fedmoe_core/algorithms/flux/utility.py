"""What an expert is worth training, and which are trained or only looked at (Flux, arXiv 2508.19078, eqs. 3 and 4)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedmoe_core.base.rng import counter_seed


@dataclass(frozen=True)
class Roles:
    """A client's experts of one round, (L, E) each; those in neither mask are merged and frozen.

    Attributes:
        exploit_LE: trained.
        explore_LE: kept as they are, their utility estimated by forward passes alone.
    """

    exploit_LE: np.ndarray
    explore_LE: np.ndarray


def utility(tokens_LE: np.ndarray, grad_sq_sum_LE: np.ndarray) -> np.ndarray:
    """Return u_e = |D_e| sqrt((1/|D_e|) sum_{k in D_e} |grad_k|^2): Flux eq. 3 [N], in the norm-square form [E].

    The notes print grad_k without a norm; this is the form that the formula comes from (Oort). 0 without a token.

    Args:
        tokens_LE: |D_e|, tokens that went through e.
        grad_sq_sum_LE: sum over them of the squared gradient norm.
    """
    return np.sqrt(tokens_LE * np.where(tokens_LE > 0, grad_sq_sum_LE, 0.0))


def first_utility(freq_LE: np.ndarray) -> np.ndarray:
    """Return round 1's u_e = norm(f_e), before any gradient [N]: frequencies over their sum [E]; equal if all are 0."""
    total = float(freq_LE.sum())
    return freq_LE / total if total > 0 else np.full(freq_LE.shape, 1.0 / freq_LE.size)


def exploit_share(round: int, *, start: float, step: float, most: float) -> float:
    """Return epsilon_t = min(most, start + step * t), t from 0: exploitation grows (Flux [N], this gloss [E]).

    Raises:
        ValueError: a share outside [0, 1], or a step below 0.
    """
    if not (0 <= start <= 1 and 0 <= most <= 1 and step >= 0):
        given = f"start={start}, step={step}, most={most}"
        raise ValueError(f"epsilon must grow within 0..1, {given} does not; give start and most in 0..1, step >= 0")
    return min(most, start + step * round)


def assign_roles(utility_LE: np.ndarray, count: int, epsilon: float, *, rng: np.random.Generator) -> Roles:
    """Apply Flux eq. 4 [N]: of |E_i| = B_tune experts the top eps |E_i| by utility are trained, the rest explored.

    max sum_e x_e u_e with sum_e x_e <= B_tune separates by client, so its solution is the top B_tune. Of them
    ceil(eps B_tune), at least one, are trained; the other places go to experts drawn uniformly from all the others,
    inside the top B_tune or not [E]. Ties go to the smaller layer, then the smaller expert id.

    Raises:
        ValueError: count outside 1..L*E.
    """
    if not 1 <= count <= utility_LE.size:
        raise ValueError(f"{count} tuned experts is outside 1..{utility_LE.size}; change the tuning budget")
    # Against 0.7 * 10 = 7.000000000000001, which is seven.
    exploit = max(1, math.ceil(epsilon * count - 1e-9))
    order = np.argsort(-utility_LE, axis=None, kind="stable")
    exploit_LE = np.zeros(utility_LE.shape, dtype=bool)
    exploit_LE.flat[order[:exploit]] = True
    explore_LE = np.zeros(utility_LE.shape, dtype=bool)
    explore_LE.flat[rng.choice(np.sort(order[exploit:]), size=count - exploit, replace=False)] = True
    return Roles(exploit_LE, explore_LE)


def spsa(loss: Callable[[Tensor], float], weights: Tensor, *, sigma: float = 1e-3, probes: int = 4, seed: int) -> float:
    """Estimate |g|^2 of ``loss`` at ``weights`` from 2 * probes forward passes, no backward: Flux's exploration.

    The paper's estimate of g is (L(W + xi) - L(W)) / xi with xi ~ N(0, sigma^2) [N]. Here z is unit normal and the
    difference central: d = (L(W + sigma z) - L(W - sigma z)) / (2 sigma) [E]. E[d z] = g up to O(sigma^2), but
    |d z|^2 exceeds |g|^2 by about the dimension; E[d^2] = |g|^2 needs no such correction, so the mean of d^2 is
    returned [D], with a relative standard deviation of sqrt(2 / probes).

    Args:
        loss: mean loss of one fixed batch for given weights; same weights, same number.
        weights: one tensor; read only, in float32 or wider for sigma to register.
        sigma, probes, seed: probe size, number of probe pairs, and what they are drawn from.

    Raises:
        ValueError: sigma or probes not positive, or a loss that is not finite.
    """
    if not sigma > 0 or probes < 1:
        raise ValueError(f"sigma={sigma}, probes={probes}: both must be positive to measure a slope")
    squares = 0.0
    for probe in range(probes):
        generator = torch.Generator(device="cpu").manual_seed(counter_seed(seed, "spsa", probe))
        z = torch.randn(weights.shape, generator=generator, dtype=torch.float64).to(weights)
        slope = (loss(weights + sigma * z) - loss(weights - sigma * z)) / (2 * sigma)
        if not math.isfinite(slope):
            raise ValueError(
                f"probe {probe}: the loss near the weights is not finite; use a smaller sigma than {sigma}"
            )
        squares += slope * slope
    return squares / probes
