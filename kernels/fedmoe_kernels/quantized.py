"""Weights in 8 or 4 bits with one scale per group of columns: storage for experts that run but do not learn.

Shapes: X matrices of N x K, G = K / group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_LARGEST = {8: 127, 4: 7}


@dataclass(frozen=True, eq=False)
class Quantized:
    """X stacked matrices as w = code * scale of the code's group.

    Attributes:
        codes: (X, N, K) int8; or (X, N, K / 2) uint8 with two codes a byte, column 2j in the low four bits and
            2j + 1 in the high ones, each stored as code + 8.
        scale: (X, N, G) float32; group g covers columns g * group..(g + 1) * group - 1.

    Raises:
        ValueError: when codes and scale do not fit together, or a group is not a multiple of 32 columns.
    """

    codes: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        codes, scale = self.codes, self.scale
        if codes.dim() != 3 or codes.dtype not in (torch.int8, torch.uint8):
            raise ValueError(f"Quantized: codes are {_what(codes)}; they must be int8 (X, N, K) or uint8 (X, N, K / 2)")
        fits = scale.dim() == 3 and scale.shape[:2] == codes.shape[:2] and scale.shape[2] > 0
        if not fits or scale.dtype != torch.float32 or scale.device != codes.device:
            raise ValueError(
                f"Quantized: scale is {_what(scale)} on {scale.device}, codes {_what(codes)} on {codes.device}; "
                "it must be float32 (X, N, K / group) for these codes"
            )
        if self.shape[2] % scale.shape[2] or self.group % 32:
            raise ValueError(
                f"Quantized: {scale.shape[2]} groups over {self.shape[2]} columns; groups must be equal multiples of 32"
            )

    @classmethod
    def of(cls, tensor: Tensor, bits: int, group: int = 128) -> Quantized:
        """Round a (X, N, K) stack to the nearest codes; the largest magnitude of each group sets its scale.

        The error of a weight is at most half a scale: 0.4 % of its group's largest magnitude with 8 bits, 7.2 % with 4.

        Args:
            tensor: floating weights, finite.
            bits: 8 or 4.
            group: columns that share a scale, a multiple of 32 that divides K; 128 costs 0.25 bits a weight.

        Raises:
            ValueError: for another width, a group that does not fit, or a value that is not finite.
        """
        if bits not in _LARGEST:
            raise ValueError(f"bits is {bits}; weights are quantised to 8 or 4")
        if tensor.dim() != 3 or not tensor.is_floating_point():
            raise ValueError(f"tensor is {_what(tensor)}; it must be floating and 3-D, one matrix a slot")
        if group < 1 or group % 32 or tensor.shape[2] % group:
            raise ValueError(
                f"group={group} does not fit {tensor.shape[2]} columns; choose a multiple of 32 dividing them"
            )
        grouped = tensor.detach().float().unflatten(2, (-1, group))
        largest = grouped.abs().amax(3)
        if tensor.device.type != "meta" and not bool(largest.isfinite().all()):
            raise ValueError("tensor holds a value that is not finite; quantise weights that are")
        scale = largest / _LARGEST[bits]
        # A group of zeros has scale 0 and codes 0; one so small that its scale underflows is stored as zeros too.
        codes = (grouped / scale.unsqueeze(3).clamp_min(torch.finfo(torch.float32).tiny)).round_()
        codes = codes.clamp_(-_LARGEST[bits], _LARGEST[bits]).to(torch.int8).flatten(2)
        return cls(codes if bits == 8 else _pack(codes), scale)

    @property
    def bits(self) -> int:
        """8 or 4."""
        return 8 if self.codes.dtype == torch.int8 else 4

    @property
    def shape(self) -> torch.Size:
        """(X, N, K), whatever the packing."""
        X, N, width = self.codes.shape
        return torch.Size((X, N, width * 8 // self.bits))

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.shape[2] // self.scale.shape[2]

    @property
    def bytes(self) -> int:
        """What the codes and scales occupy."""
        return sum(t.numel() * t.itemsize for t in (self.codes, self.scale))

    def __getitem__(self, index: int) -> Quantized:
        """Return one matrix, as a stack of one; a view."""
        return Quantized(self.codes[index, None], self.scale[index, None])

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return (X, N, K): the product in float32 (float64 for float64), rounded once to `dtype`."""
        return dequantize(self.codes, self.scale, dtype)

    def to(self, device: torch.device | str) -> Quantized:
        """Return the same weights on another device."""
        return Quantized(self.codes.to(device), self.scale.to(device))


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn codes (..., N, K) or (..., N, K / 2) with scales (..., N, G) into (..., N, K)."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if codes.dtype == torch.uint8:
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2).to(torch.int8) - 8
    grouped = codes.to(wide).unflatten(-1, (scale.shape[-1], -1))
    return grouped.mul_(scale.to(wide).unsqueeze(-1)).flatten(-2).to(dtype)


def _pack(codes: Tensor) -> Tensor:
    low, high = (codes + 8).to(torch.uint8).unflatten(2, (-1, 2)).unbind(3)
    return low | (high << 4)


def _what(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"
