"""What a model costs besides its routers and experts: measured by dry steps, for no closed form covers it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class TrunkCost:
    """What no closed form covers, taken from dry steps of one (model, batch, sequence, backend).

    A step passes through stages. Stage 0 lasts until the first expert gradient exists (forward, loss, backward of the
    head), stage s while the gradients of the s deepest MoE layers exist; stage L comes after the last. Live memory that
    is neither weights, optimizer state nor expert and router gradients is the stage's transient. It depends on the rows
    T * k', not on the experts held. ``CostModel.calibrated`` fills it in from measured peaks.

    Attributes:
        transients: k' -> bytes at each of the L + 1 stages, or one entry for the whole step (then every expert
            gradient is taken to coincide with it: safe, less tight).
        gradient_copies: further copies of one layer's expert gradients while its backward runs; 0 where the backend
            writes gradients in place, 1 where autograd stacks per-slot gradients or clones them.
        step_bytes: temporaries of the optimizer step; 0 for fused AdamW.
        buffer_bytes: non-parameter tensors that live as long as the model (rotary tables).
        flops_per_token: forward and backward of everything but routers and experts, per token of a training step.
        forward_flops_per_token: the forward's part of it.
    """

    transients: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    gradient_copies: int = 0
    step_bytes: int = 0
    buffer_bytes: int = 0
    flops_per_token: float = 0.0
    forward_flops_per_token: float = 0.0

    def stages(self, top_k: int) -> tuple[int, ...]:
        """Return the transient bytes of each stage at k'; if unmeasured, those of the next larger k' (a bound).

        Raises:
            ValueError: something was measured, but nothing at k' or above.
        """
        if not self.transients:
            return (0,)
        measured = min((k for k in self.transients if k >= top_k), default=None)
        if measured is None:
            raise ValueError(f"no dry step covers top_k={top_k}; calibrate at {top_k} or more")
        return self.transients[measured]


UNMEASURED = TrunkCost()
