"""What a probe may answer: each number table with its shape and range, declared by the probe and checked before use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST_MEASURE = 1e30  # sums over clients then stay far below the end of float64


@dataclass(frozen=True)
class Measure:
    """One table of float64 that a probe answers.

    Attributes:
        axes: its shape, one sign for each axis, as names of arrays end: "L" MoE layers, "E" experts of a layer, a digit
            that many; "" = one number.
        least, most: bounds of every number.
        within: name of another table of the same answer and shape that bounds this one number by number; "" = none.
    """

    axes: str = "LE"
    least: float = 0.0
    most: float = LARGEST_MEASURE
    within: str = ""

    def shape(self, shape_LE: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of this table for a model of (L, E).

        Raises:
            ValueError: an axis that is not known.

        Example:
            >>> Measure("3LE").shape((2, 8))
            (3, 2, 8)
        """
        sizes = dict(zip("LE", shape_LE, strict=True))
        if strange := [sign for sign in self.axes if sign not in sizes and not sign.isdecimal()]:
            raise ValueError(f"a measure has an axis {strange[0]!r}; use L, E and digits")
        return tuple(int(sign) if sign.isdecimal() else sizes[sign] for sign in self.axes)


def misanswered(asked: Mapping[str, Measure], given: Mapping[str, Tensor], shape_LE: tuple[int, ...]) -> str:
    """Return in one sentence what of an answer is not as it was declared; empty where all is.

    Args:
        asked: by name.
        given: what the client answered; not trusted.
        shape_LE: (L, E).
    """
    for name in sorted(asked.keys() ^ given.keys()):
        return f"its probes' {name!r:.80} is {'missing' if name in asked else 'not one that its plan asks for'}"
    for name, measure in asked.items():
        table, shape = given[name], measure.shape(shape_LE)
        if type(table) is not Tensor or table.dtype != torch.float64 or tuple(table.shape) != shape:
            return f"its probe's {name!r:.80} is not a tensor of float64 of shape {shape}"
        if not bool(table.isfinite().all()):
            return f"its probe's {name!r:.80} holds NaN or infinity"
        if table.numel() and not (float(table.min()) >= measure.least and float(table.max()) <= measure.most):
            low, high = float(table.min()), float(table.max())
            return f"its probe's {name!r:.80} reaches {low:g} to {high:g}, not {measure.least:g} to {measure.most:g}"
    for name, measure in asked.items():
        if measure.within and bool((given[name] > given[measure.within]).any()):
            return f"its probe's {name!r:.80} is above {measure.within!r:.80}, of which it is a part"
    return ""
