"""What a device can bear, and what a plan will cost it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """Hard limits of one device for one round; None = no limit.

    Attributes:
        memory_bytes: peak bytes of weights, gradients, optimizer state and activations.
        flops: floating-point operations a round.
        bytes_down, bytes_up: traffic a round.
        experts: total number of experts over all MoE layers (HFedMoE eq. 15's cardinality budget [N]).
    """

    memory_bytes: int | None = None
    flops: float | None = None
    bytes_down: int | None = None
    bytes_up: int | None = None
    experts: int | None = None
    name: str = ""


@dataclass(frozen=True)
class Cost:
    """Predicted or measured cost of one client in one round, in the units of ``Budget``; seconds are wall-clock."""

    memory_bytes: int = 0
    flops: float = 0.0
    bytes_down: int = 0
    bytes_up: int = 0
    experts: int = 0
    seconds: float = 0.0
