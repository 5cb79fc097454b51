"""From the peaks of dry steps to a cost model's measured terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from fedmoe_core.budget.cost_model import CostModel


def calibrated(
    model: CostModel,
    peaks: Mapping[int, Sequence[int]],
    permitted_LE: np.ndarray,
    trainable_LE: np.ndarray,
    **measured: float,
) -> CostModel:
    """Return a cost model with its transients set from dry steps of one configuration.

    Args:
        model: the closed-form terms.
        peaks: k' -> peak live bytes in each stage (L + 1 entries, see ``TrunkCost``), or of the whole step (one
            entry: its own expert gradients are then not subtracted, as it is unknown whether they coincided
            with the peak; measure with one trainable expert per layer to keep that excess small).
        permitted_LE, trainable_LE: the configuration measured.
        measured: further fields of ``TrunkCost``.

    Raises:
        ValueError: a peak is smaller than the closed-form terms, so it cannot be of this configuration.
    """
    base = replace(model, trunk=replace(model.trunk, transients={}, **measured))  # type: ignore[arg-type]
    # The few bytes kept per slot are not taken off: a plan with fewer slots than this one stays bounded.
    held = int(permitted_LE.sum()) * (base.frozen_bytes - base.slot_bytes)
    learning = base.held_bytes - base.frozen_bytes + base.state_bytes
    fixed = base.resident_bytes + held + int(trainable_LE.sum()) * learning
    transients = {}
    for top_k, stages in peaks.items():
        gradients = [0]
        if len(stages) > 1:
            # To take off rows that had no gradient at the height would leave plans short that train fewer of them.
            sure = [base.gradients(stage, of=len(stages), at_least=True) for stage in range(len(stages))]
            gradients = [int((each_L1 * trainable_LE).sum()) for each_L1 in sure]
        left = tuple(peak - fixed - gradient for peak, gradient in zip(stages, gradients, strict=True))
        if max(left) < 0:
            raise ValueError(
                f"the peak measured at top_k={top_k}, {max(stages)} bytes, is below its weights and optimizer "
                f"state, {fixed} bytes; measure a step that has both"
            )
        transients[top_k] = left
    return replace(base, trunk=replace(base.trunk, transients=transients))
