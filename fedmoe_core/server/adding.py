"""How weighted deltas enter the exact sums: block by block through one small buffer, nearly one pass over memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmoe_core.server.blocks import cut
from fedmoe_core.server.fixed_point import SumSettings

# Values in one block for each thread of torch: a buffer of 2 MB. 17.1 M float32 values took one thread (1 MB of L2,
# 32 MB of L3) 44, 37, 32, 26, 23, 22, 23, 29 ms with blocks of 2^14 to 2^21: starting five operations costs more than
# leaving L2. The memory does not grow past MOST_THREADS.
# One multiply-add for the factor and SHIFT would save 2 ms of 24, and rounds float64 deltas otherwise: left out.
BLOCK_CPU = 1 << 18
MOST_THREADS = 8
BLOCK_GPU = 1 << 24
# Starting a block costs what 8 thousand values cost. Rows at least this long are blocks of their own where that saves
# work: the weight is 0, or the row before lies elsewhere in the sums. Shorter ones share a block all the same.
LONG_ROW = 1 << 13
# In [2^52, 2^53) the float64 numbers are the integers. So adding 1.5 * 2^52 to |x| <= 2^51 rounds x half to even, as
# round() does, and leaves the bits of 1.5 * 2^52 plus that integer: no conversion, which AVX2 lacks.
SHIFT = 1.5 * 2.0**52
SHIFT_BITS = 0x4338_0000_0000_0000
SHIFTABLE = 1 << 51


@dataclass(frozen=True)
class Adder:
    """Adds ``round(weight * share * delta * 2**scale_bits)`` to int64 sums, with one buffer for everything it adds.

    A float32 delta (24 significant bits) times a 12-bit weight is exact in float64, so only the rounding to the
    fixed-point grid is inexact, by half a unit of the sum. A share other than 1 is rounded to float64 before that. The
    sums do not depend on the blocks.

    Attributes:
        settings: the number format.
        buffer: (block,) float64, on the device of the sums; its content means nothing between calls.
        shifts: whether every term is at most SHIFTABLE.
        share: what every delta is multiplied by, in (0, 1].
    """

    settings: SumSettings
    buffer: Tensor
    shifts: bool
    share: float = 1.0

    @classmethod
    def on(
        cls,
        device: torch.device,
        settings: SumSettings,
        longest: int,
        *,
        largest: float | None = None,
        share: float = 1.0,
    ) -> Adder:
        """Make an adder.

        Args:
            device: of the sums.
            settings: the number format.
            longest: values of the longest tensor.
            largest: no |delta| is above it; None = ``settings.value_bound``.
            share: as the attribute.
        """
        block = BLOCK_CPU * min(torch.get_num_threads(), MOST_THREADS) if device.type == "cpu" else BLOCK_GPU
        size = max(1, min(block, longest))
        reaches = settings.value_bound if largest is None else largest
        shifts = math.ceil(reaches * 2.0**settings.scale_bits) * settings.top_weight <= SHIFTABLE
        return cls(settings, torch.empty(size, dtype=torch.float64, device=device), shifts, share)

    def add(self, total: Tensor, delta: Tensor, weights: Sequence[int], rows: Sequence[int]) -> None:
        """Add rows of ``delta`` to rows of ``total``.

        Args:
            total: (E, ...) int64, contiguous, changed in place.
            delta: (B, ...) floating, finite and within the settings' bound; any strides, never changed.
            weights: B integers, in [0, top_weight].
            rows: B distinct rows of ``total``, one for each row of ``delta``.
        """
        if not delta.numel():
            return
        delta = delta.detach()
        for start, stop in self._blocks(weights, rows, delta.numel() // len(rows)):
            place, part = rows[start:stop], delta[start:stop]
            factors = [weight * 2.0**self.settings.scale_bits * self.share for weight in weights[start:stop]]
            factor: float | Tensor = factors[0]
            if len(set(factors)) > 1:
                factor = torch.tensor(factors, dtype=torch.float64, device=total.device)
                factor = factor.view(-1, *[1] * (part.dim() - 1))
            if place == list(range(place[0], place[0] + len(place))):
                for target, piece in cut(len(self.buffer), total[place[0] : place[0] + len(place)], part):
                    target.add_(self._whole(piece, factor))
            else:
                total.index_add_(0, torch.tensor(place, device=total.device), self._whole(part, factor))

    def _blocks(self, weights: Sequence[int], rows: Sequence[int], length: int) -> Iterator[tuple[int, int]]:
        """Yield the (start, stop) of rows to add at once: as many as the buffer holds, or one longer row."""
        most = max(1, len(self.buffer) // length)
        start = 0
        for stop in range(1, len(rows) + 1):
            end = stop == len(rows) or stop - start == most
            if not end and length >= LONG_ROW:
                end = 0 in (weights[stop - 1], weights[stop]) or rows[stop] != rows[stop - 1] + 1
            if end:
                if any(weights[start:stop]):
                    yield start, stop
                start = stop

    def _whole(self, delta: Tensor, factor: float | Tensor) -> Tensor:
        """Return round(delta * factor) as int64 of ``delta``'s shape, in the buffer until the next call."""
        scaled = self.buffer[: delta.numel()].view(delta.shape).copy_(delta).mul_(factor)
        if self.shifts:
            return scaled.add_(SHIFT).view(torch.int64).sub_(SHIFT_BITS)
        return scaled.round_().to(torch.int64)
