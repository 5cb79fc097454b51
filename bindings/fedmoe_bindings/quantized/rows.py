"""Rows and stacks of few-bit experts: gate and up sorted or in turn, experts end to end, and plain weights again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedmoe_kernels.quantized import Quantized


def sorted_rows(rows: Tensor) -> Tensor:
    """Sort rows of gate and up in turn, (E, 2I, ...), to all of gate, then all of up; a bias has only two axes."""
    return torch.cat([rows[:, ::2], rows[:, 1::2]], 1)


def rows_in_turn(rows: Tensor) -> Tensor:
    """Undo ``sorted_rows``."""
    return torch.stack(rows.chunk(2, 1), 2).flatten(1, 2)


def stacked(experts: Sequence[Quantized]) -> Quantized:
    """Lay experts that are stored one by one end to end, in the order given.

    Raises:
        ValueError: none is given, or they differ in format.
    """
    _check_one_format(experts)
    wholes = [expert.whole for expert in experts if expert.whole is not None]
    codes, scale = torch.cat([e.codes for e in experts]), torch.cat([e.scale for e in experts])
    return Quantized(codes, scale, experts[0].format, torch.cat(wholes) if wholes else None)


def gate_and_up(gate: Quantized, up: Quantized) -> Quantized:
    """Make w_in of two projections that are stored apart, (E, I, H) each: rows of gate, then rows of up.

    Raises:
        ValueError: they differ in format, or each has a scale of its whole matrix (nvfp4), and w_in can have but one.
    """
    _check_one_format([gate, up])
    if gate.whole is not None or up.whole is not None:
        raise ValueError(f"gate and up in {gate.format} have a scale each; quantise w_in as one matrix")
    return Quantized(torch.cat([gate.codes, up.codes], 1), torch.cat([gate.scale, up.scale], 1), gate.format)


def plain(weights: Quantized, dtype: torch.dtype, *, interleaved: bool = False, transposed: bool = False) -> Tensor:
    """Decode to plain numbers as a stock model keeps them, to save or to export.

    Args:
        weights: (E, N, K).
        dtype: of the result; every code and scale is exact in float32.
        interleaved: put rows of gate and up in turn.
        transposed: return (E, K, N).
    """
    decoded = weights.dequantize(dtype)
    decoded = rows_in_turn(decoded) if interleaved else decoded
    return decoded.mT.contiguous() if transposed else decoded


def _check_one_format(parts: Sequence[Quantized]) -> None:
    formats = {part.format for part in parts}
    if len(formats) != 1:
        raise ValueError(f"weights in {len(formats)} formats ({', '.join(sorted(formats))}); give some, all in one")
