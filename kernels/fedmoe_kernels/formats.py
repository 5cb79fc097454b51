"""The forms in which frozen weights are stored: what a code stands for, and which weights share a scale.

A weight is value(code) * scale of its block, and times the scale of its whole matrix where the format has one.

Shapes: X matrices of N x K.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd
from typing import Final

import torch
from torch import Tensor

_E4M3, _E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
# Sign, two bits of exponent, one of mantissa: the eight magnitudes of OCP's Microscaling Formats v1.0, table 5.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# The 16 levels of QLoRA (Dettmers et al. 2023, arXiv 2305.14314, appendix E): quantiles of a normal distribution,
# scaled to -1..1, with an exact zero. In float32 as every implementation holds them.
NF4: Final = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@dataclass(frozen=True)
class Format:
    """One stored form.

    Attributes:
        name: as it is passed and saved.
        codes: dtype of the codes; uint8 holds two codes a byte, column 2j in the low four bits and 2j + 1 in the high.
        scale: dtype of a block's scale.
        block: rows and columns of the usual block; other blocks are served where `fits` says so.
        levels: what the sixteen codes stand for; () where a code is itself a number.
        largest: the greatest magnitude of a code.
        whole: whether each matrix has a further scale, one float32.
    """

    name: str
    codes: torch.dtype
    scale: torch.dtype
    block: tuple[int, int]
    levels: tuple[float, ...]
    largest: float
    whole: bool = False

    @property
    def bits(self) -> int:
        """Bits of a code: 8 or 4."""
        return 4 if self.levels else 8

    def fits(self, rows: int, columns: int) -> str | None:
        """Say why a scale cannot be shared by blocks of so many rows and columns; None = it can.

        Kernels read whole groups of codes: 32 columns, or 16 where the format's own block is as short.
        """
        step = min(32, self.block[1])
        if columns < 1 or columns % step:
            return f"blocks of {columns} columns; {self.name} takes multiples of {step}"
        return None if rows >= 1 else f"blocks of {rows} rows"

    def block_of(self, rows: int, columns: int) -> tuple[int, int]:
        """Choose the block for matrices of this size: the usual one, or the largest part of it that divides them.

        Raises:
            ValueError: when the format has no block that does.
        """
        tall, wide = gcd(rows, self.block[0]), self.block[1]
        step = min(32, wide)
        fitting = [size for size in range(wide, 0, -step) if columns % size == 0]
        if not fitting:
            raise ValueError(f"{self.name} needs widths that {step} divides, not {columns}; store them in another form")
        return max(1, tall), fitting[0]

    def bytes_of(self, rows: int, columns: int) -> float:
        """Return what a matrix of this size occupies, codes and scales."""
        tall, wide = self.block_of(rows, columns)
        scales = rows // tall * (columns // wide)
        return rows * columns * self.bits / 8 + scales * self.scale.itemsize + (4 if self.whole else 0)

    def pairs(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Make (256, 2), what the two codes of each byte stand for."""
        levels = torch.tensor(self.levels, dtype=dtype, device=device)
        return torch.stack([levels.repeat(16), levels.repeat_interleave(16)], 1)


_INT4 = tuple(float(code - 8) for code in range(16))
# A plain dict, and not a MappingProxyType, for the reason that `activations.ACTIVATIONS` is one.
FORMATS: Final[Mapping[str, Format]] = {
    form.name: form
    for form in (
        Format("int8", torch.int8, torch.float32, (1, 128), (), 127.0),
        Format("int4", torch.uint8, torch.float32, (1, 128), _INT4, 7.0),
        Format("fp8_e4m3", _E4M3, torch.float32, (128, 128), (), 448.0),
        Format("mxfp4", torch.uint8, _E8M0, (1, 32), (*_E2M1, *(-value for value in _E2M1)), 6.0),
        Format("nvfp4", torch.uint8, _E4M3, (1, 16), (*_E2M1, *(-value for value in _E2M1)), 6.0, whole=True),
        Format("nf4", torch.uint8, torch.float32, (1, 64), NF4, 1.0),
    )
}


def format_named(name: str) -> Format:
    """Look a format up.

    Raises:
        ValueError: when there is none of that name.
    """
    if name not in FORMATS:
        raise ValueError(f"format {name!r} does not exist; choose one of {', '.join(FORMATS)}")
    return FORMATS[name]


def dequantize(codes: Tensor, scale: Tensor, whole: Tensor | None, form: Format, dtype: torch.dtype) -> Tensor:
    """Turn stored matrices into numbers.

    The scales are multiplied first, then the code's value by both, in float32 (float64 for float64), and the result is
    rounded once to `dtype`.

    Args:
        codes: (..., N, K), or (..., N, K / 2) with two codes a byte.
        scale: (..., N / rows, K / columns) of the block.
        whole: (...), each matrix's own scale, where the format has one.
        form: the format.
        dtype: of the result, floating.

    Returns:
        (..., N, K).
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    factor = scale.to(wide)
    if whole is not None:
        factor = factor * whole.to(wide)[..., None, None]
    rows, groups = scale.shape[-2:]
    if form.levels:
        # A table of bytes: looked up by code, the indices alone would take as much as the result.
        values = (
            form.pairs(codes.device, wide)
            .index_select(0, codes.flatten().int())
            .view(*codes.shape[:-1], 2 * codes.shape[-1])
        )
    else:
        values = codes.to(wide)
    blocks = values.unflatten(-1, (groups, -1)).unflatten(-3, (rows, -1))
    return blocks.mul_(factor[..., :, None, :, None]).flatten(-4, -3).flatten(-2).to(dtype)
