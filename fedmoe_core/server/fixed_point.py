"""Exact sums: how real deltas and weights become integers whose sums cannot round nor overflow."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

INT64_MAX = (1 << 63) - 1


@dataclass(frozen=True)
class SumSettings:
    """The number format of the sums, proved at construction never to overflow int64 (invariant 13).

    A delta d with integer weight q adds round(q * d * 2**scale_bits). Float addition depends on order; integer addition
    does not, so clients may be summed in any order and on any number of ranks with the same bits.

    Attributes:
        scale_bits: binary places kept after the point.
        value_bound: largest |delta| accepted.
        norm_bound: largest L2 norm of a whole update accepted.
        weight_bits: real weights in [0, 1] become integers 0..2**weight_bits - 1.
        max_clients: most updates that one sum may hold.

    Raises:
        ValueError: a setting is out of range, or ``max_clients`` updates at the bounds could pass 2**63.
    """

    scale_bits: int = 36
    value_bound: float = 1.0
    norm_bound: float = 100.0
    weight_bits: int = 12
    max_clients: int = 1024

    def __post_init__(self) -> None:
        for name, low, high in (("scale_bits", 1, 62), ("weight_bits", 1, 30), ("max_clients", 1, 1 << 31)):
            value = getattr(self, name)
            if not isinstance(value, int) or not low <= value <= high:
                raise ValueError(f"{name} = {value!r} is not a whole number from {low} to {high}; set one")
        for name in ("value_bound", "norm_bound"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} = {getattr(self, name)!r} is not a positive finite number; set one")
        if self.value_bound <= self.resolution:
            raise ValueError(
                f"value_bound = {self.value_bound:g} is not above 2^-{self.scale_bits}, the resolution; raise it"
            )
        if self.largest_sum > INT64_MAX:
            bits = next((b for b in range(self.scale_bits - 1, 0, -1) if self._largest_sum(b) <= INT64_MAX), 0)
            clients = INT64_MAX * self.max_clients // self.largest_sum
            remedies = [f"scale_bits to {bits}"] * (bits > 0) + [f"max_clients to {clients}"] * (clients > 0)
            raise ValueError(
                f"sums of {self.max_clients} clients could reach 2^{math.log2(self.largest_sum):.2f}, past the 2^63 of "
                f"int64; lower {' or '.join([*remedies, 'value_bound', 'weight_bits'])}"
            )

    @property
    def resolution(self) -> float:
        """Smallest difference between two deltas that a sum can tell apart, in units of the parameter."""
        return 2.0**-self.scale_bits

    @property
    def top_weight(self) -> int:
        """The integer that stands for weight 1."""
        return (1 << self.weight_bits) - 1

    @property
    def largest_sum(self) -> int:
        """Upper bound of |sum|, in exact integers: ceil(value_bound * 2^scale_bits) * 2^weight_bits * max_clients."""
        return self._largest_sum(self.scale_bits)

    @property
    def largest_term(self) -> int:
        """Upper bound of |weight * delta * 2^scale_bits| of one client: what one update can add to one sum."""
        return self._largest_sum(self.scale_bits) // self.max_clients

    def _largest_sum(self, scale_bits: int) -> int:
        per_client = math.ceil(Fraction(self.value_bound) * (1 << scale_bits)) << self.weight_bits
        return per_client * self.max_clients

    def check_resolution(self, lr: float) -> None:
        """Refuse a learning rate whose steps the sums would round away.

        Raises:
            ValueError: the resolution is not below a thousandth of ``lr``, or ``lr`` is not positive.
        """
        if not lr > 0:
            raise ValueError(f"learning rate {lr:g} is not positive; set one above 0")
        if self.resolution >= lr / 1000:
            raise ValueError(
                f"the sums resolve 2^-{self.scale_bits} = {self.resolution:.2g}, not below a thousandth of the "
                f"learning rate {lr:g}; raise scale_bits to at least {math.floor(-math.log2(lr / 1000)) + 1}"
            )

    def quantize_one(self, weight: float) -> int:
        """Turn one weight, as ``quantize``."""
        return max(round(float(weight) * self.top_weight), 1) if weight > 0 else 0

    def quantize(self, weight: Any) -> np.ndarray:
        """Turn real weights in [0, 1] into int64 in [0, top_weight]: 0 stays 0, anything above 0 becomes at least 1."""
        real = np.asarray(weight, dtype=np.float64)
        return np.where(real > 0, np.maximum(np.rint(real * self.top_weight), 1), 0).astype(np.int64)
