"""What one client may add to the sums: never more than a bound in L2 norm, whatever it sends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from fedmoe_core.messages.plan import ExpertPlan
from fedmoe_core.messages.update import ClientUpdate
from fedmoe_core.model.spec import ParamSpec
from fedmoe_core.server.admission import refusal
from fedmoe_core.server.fixed_point import SumSettings

# Covers the float64 arithmetic of the norm (n * 2^-53 for n values, 2^-23 for a billion) and of the product with it.
MARGIN = 1 - 2.0**-20


def clip_share(
    update: ClientUpdate, plan: ExpertPlan, specs: Sequence[ParamSpec], settings: SumSettings, clip: float
) -> float:
    """Return what the deltas of an update are multiplied by, in (0, 1], so that its part of the sums is bounded.

    Its part is the vector of all round(share * q * delta * 2^scale_bits), with q the integer weight of each row. With
    this share its L2 norm is at most floor(clip * 2^scale_bits * top_weight): rounding moves each of N numbers by at
    most 1/2, so the vector by at most sqrt(N)/2, and the vector before rounding is kept shorter by that much.

    Args:
        update, plan: what the client sent, and what it was asked for; an update that the sums refuse gets 1.
        specs, settings: of the sums.
        clip: largest norm, in units of the parameters, of a client whose weights are 1.

    Raises:
        ValueError: ``clip`` is not above what rounding alone may add.
    """
    most = target(specs, settings, clip)
    if refusal(update, plan, specs, settings) is not None:
        return 1.0
    norm = math.sqrt(math.fsum(_squares(update, plan, specs, settings)))
    return min(1.0, most / norm) if norm else 1.0


def sensitivity(settings: SumSettings, clip: float) -> int:
    """Return the largest L2 norm of one client's part of the sums, in units of the sums."""
    return math.floor(Fraction(clip) * 2**settings.scale_bits * settings.top_weight)


def target(specs: Sequence[ParamSpec], settings: SumSettings, clip: float) -> float:
    """Return the norm to clip to before rounding, in units of the parameters; raises as ``clip_share``."""
    count = sum(math.prod(spec.shape) for spec in specs)
    most = (sensitivity(settings, clip) - math.sqrt(count) / 2) * MARGIN
    if most <= 0:
        raise ValueError(
            f"privacy.clip={clip:g} is below what rounding {count} numbers to 2^-{settings.scale_bits} adds; raise it"
        )
    return most / settings.top_weight * 2.0**-settings.scale_bits


def _squares(update: ClientUpdate, plan: ExpertPlan, specs: Sequence[ParamSpec], settings: SumSettings) -> list[float]:
    """Return squared norms, one a tensor, of the deltas times their weights as the sums have them."""
    found = []
    for spec in specs:
        if (delta := update.deltas.get(spec.key)) is None:
            continue
        if spec.kind == "dense":
            weights = [settings.quantize_one(update.sample_weight)]
            rows_BN = delta.detach().reshape(1, -1)
        else:
            table_LE = update.expert_weight_LE if spec.kind == "expert" else update.router_weight_LE
            weights = settings.quantize(table_LE[spec.layer][plan.trainable_LE[spec.layer]]).tolist()
            rows_BN = delta.detach().reshape(len(weights), -1)
        found.append(_weighted_square(rows_BN, weights) / settings.top_weight**2)
    return found


def _weighted_square(rows_BN: Tensor, weights: Sequence[int]) -> float:
    norms_B = torch.linalg.vector_norm(rows_BN, dim=1, dtype=torch.float64).cpu()
    return float((norms_B * torch.tensor(weights, dtype=torch.float64)).square().sum())
