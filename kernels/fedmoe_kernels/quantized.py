"""Frozen weights in 8 or 4 bits: the record of codes and scales, and how weights are rounded to it.

Shapes: X matrices of N x K; blocks of `rows` x `columns` weights share a scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fedmoe_kernels.formats import FORMATS, Format, dequantize, format_named

_SEARCHED = 2**15


@dataclass(frozen=True, eq=False)
class Quantized:
    """X stacked matrices, each weight a code of `format` times the scale of its block.

    How checkpoints' tensors are laid in, each expert's matrices stacked to X:

    ==========  ====================================  ==========================================================
    format      codes                                 scale
    ==========  ====================================  ==========================================================
    int8, int4  `Quantized.of`                        float32
    fp8_e4m3    `weight` of DeepSeek and Qwen3-FP8    `weight_scale_inv`, float32, a block of 128 x 128
    mxfp4       gpt-oss `blocks.flatten(-2)`          `scales.view(torch.float8_e8m0fnu)`, 32 columns
    nvfp4       ModelOpt `weight`, uint8              `weight_scale`, float8_e4m3fn, 16 columns; `whole` is its
                                                      `weight_scale_2`
    nf4         bitsandbytes' bytes with their two    `absmax`, float32, 64 columns; nested statistics are decoded
                halves exchanged                      first
    ==========  ====================================  ==========================================================

    gpt-oss stores the rows of gate and up in turn; w_in wants all of gate, then all of up.

    Attributes:
        codes: (X, N, K) int8 or float8_e4m3fn; or (X, N, K / 2) uint8 with two 4-bit codes a byte, column 2j in the
            low four bits and 2j + 1 in the high ones.
        scale: (X, N / rows, K / columns) in the format's dtype.
        format: a name of `formats.FORMATS`.
        whole: (X,) float32, each matrix's further scale; nvfp4 has it, no other format does.

    Raises:
        ValueError: when they do not fit together, or a block cannot be read by the kernels.

    Example:
        >>> import torch
        >>> stored = Quantized.of(torch.randn(2, 64, 128), "mxfp4")
        >>> tuple(stored.shape), stored.block, stored.bytes  # half a byte a weight, and one for every 32
        ((2, 64, 128), (1, 32), 8704)
    """

    codes: Tensor
    scale: Tensor
    format: str
    whole: Tensor | None = None

    def __post_init__(self) -> None:
        form, codes, scale = format_named(self.format), self.codes, self.scale
        if codes.dim() != 3 or codes.dtype != form.codes:
            width = "K / 2" if form.bits == 4 else "K"
            raise ValueError(f"Quantized: codes are {_what(codes)}; {form.name} takes {form.codes} (X, N, {width})")
        fits = scale.dim() == 3 and scale.shape[0] == codes.shape[0] and 0 not in scale.shape[1:]
        if not fits or scale.dtype != form.scale or scale.device != codes.device:
            raise ValueError(
                f"Quantized: scale is {_what(scale)} on {scale.device}, codes {_what(codes)} on {codes.device}; "
                f"{form.name} takes {form.scale} (X, N / rows, K / columns) beside the codes"
            )
        (_, N, K), (_, down, across) = self.shape, scale.shape
        unfit = None if N % down or K % across else form.fits(*self.block)
        if N % down or K % across or unfit is not None:
            unfit = unfit or f"{down} x {across} blocks over {N} x {K} weights, which they do not divide"
            raise ValueError(f"Quantized: scale means {unfit}; give one scale for each equal block")
        whole = self.whole
        if (whole is not None) != form.whole:
            raise ValueError(f"Quantized: {form.name} {'needs a' if form.whole else 'has no'} scale of whole matrices")
        if whole is not None and (
            whole.shape != codes.shape[:1] or whole.dtype != torch.float32 or whole.device != codes.device
        ):
            raise ValueError(
                f"Quantized: whole is {_what(whole)} on {whole.device}; it must be float32 ({codes.shape[0]},) on "
                f"{codes.device}"
            )

    @classmethod
    def of(cls, tensor: Tensor, format: str, block: tuple[int, int] | None = None) -> Quantized:
        """Round a (X, N, K) stack to the nearest codes; the largest magnitude of each block sets its scale.

        The error of a weight is at most half the distance of two codes: of its block's largest magnitude 0.4 % with
        int8, 7.2 % with int4, 3.6 % with fp8_e4m3, 18 % with nvfp4, 15.2 % with nf4, and 25 % with mxfp4, whose
        scales are powers of two.

        Args:
            tensor: floating weights, finite.
            format: a name of `formats.FORMATS`.
            block: rows and columns that share a scale; None = the format's own, or the largest part of it that fits.

        Raises:
            ValueError: for an unknown format, a block that does not fit, or a value that is not finite.
        """
        form = format_named(format)
        if tensor.dim() != 3 or not tensor.is_floating_point():
            raise ValueError(f"tensor is {_what(tensor)}; it must be floating and 3-D, one matrix a slot")
        _, N, K = tensor.shape
        rows, columns = form.block_of(N, K) if block is None else block
        unfit = form.fits(rows, columns)
        if unfit is None and (N % rows or K % columns):
            unfit = f"blocks of {rows} x {columns}, which do not divide {N} x {K}"
        if unfit is not None:
            raise ValueError(f"block={block} means {unfit}; choose a block that fits")
        blocks = tensor.detach().float().unflatten(2, (-1, columns)).unflatten(1, (-1, rows))
        largest = blocks.abs().amax((2, 4))
        if tensor.device.type != "meta" and not bool(largest.isfinite().all()):
            raise ValueError("tensor holds a value that is not finite; quantise weights that are")
        chosen = _scales(largest, form)
        # A block of zeros has codes of zero; one so small that its scale underflows is stored as zeros too.
        scaled = blocks / chosen.factor[:, :, None, :, None].clamp_min(torch.finfo(torch.float32).tiny)
        codes = _nearest(scaled.flatten(1, 2).flatten(2), form)
        return cls(codes, chosen.stored, format, chosen.whole)

    @property
    def bits(self) -> int:
        """Of a code: 8 or 4."""
        return FORMATS[self.format].bits

    @property
    def shape(self) -> torch.Size:
        """(X, N, K), whatever the packing."""
        X, N, width = self.codes.shape
        return torch.Size((X, N, width * 8 // self.bits))

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns that share a scale."""
        (_, N, K), (_, down, across) = self.shape, self.scale.shape
        return N // down, K // across

    @property
    def bytes(self) -> int:
        """What codes and scales occupy."""
        return sum(t.nbytes for t in (self.codes, self.scale, self.whole) if t is not None)

    def __getitem__(self, index: int) -> Quantized:
        """Return one matrix, as a stack of one; a view."""
        whole = None if self.whole is None else self.whole[index, None]
        return Quantized(self.codes[index, None], self.scale[index, None], self.format, whole)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return (X, N, K): the product in float32 (float64 for float64), rounded once to `dtype`."""
        return dequantize(self.codes, self.scale, self.whole, FORMATS[self.format], dtype)

    def to(self, device: torch.device | str) -> Quantized:
        """Return the same weights on another device."""
        whole = None if self.whole is None else self.whole.to(device)
        return Quantized(self.codes.to(device), self.scale.to(device), self.format, whole)


class _Scales(NamedTuple):
    """Each block's scale as it is stored, each matrix's own, and their product in float32."""

    stored: Tensor
    whole: Tensor | None
    factor: Tensor


def _scales(largest: Tensor, form: Format) -> _Scales:
    """Choose the scales by the largest magnitude of each block (X, N / rows, K / columns)."""
    if form.scale == torch.float8_e8m0fnu:
        # Microscaling v1.0, 6.3: the power of two of the largest magnitude over that of the format's largest number.
        _, exponent = torch.frexp(largest)
        power = (exponent - 1 - int(math.log2(form.largest))).clamp_(-126, 127)
        factor = torch.ldexp(torch.ones_like(largest), power)
        return _Scales(factor.to(form.scale), None, factor)
    if not form.whole:
        scale = largest / form.largest
        return _Scales(scale, None, scale)
    # The matrix's largest magnitude gets the largest scale, so that the scales use all of their range.
    most = torch.finfo(form.scale).max
    whole = largest.flatten(1).amax(1) / (form.largest * most) if largest.numel() else largest.new_zeros(len(largest))
    tiny = torch.finfo(torch.float32).tiny
    stored = (largest / form.largest / whole.clamp_min(tiny)[:, None, None]).clamp_(max=most).to(form.scale)
    return _Scales(stored, whole, stored.float() * whole[:, None, None])


def _nearest(scaled: Tensor, form: Format) -> Tensor:
    """Round values (X, N, K), in units of the scales, to codes; a tie goes to the code that is even."""
    if form.name in ("int8", "int4"):
        codes = scaled.round_().clamp_(-form.largest, form.largest).to(torch.int8)
        return codes if form.name == "int8" else _in_bytes((codes + 8).to(torch.uint8))
    if not form.levels:
        return scaled.clamp_(-form.largest, form.largest).to(form.codes)
    # Without minus zero, so that a zero has one code.
    order = sorted((level, code) for code, level in enumerate(form.levels) if level or math.copysign(1, level) > 0)
    levels = torch.tensor([level for level, _ in order], dtype=torch.float32, device=scaled.device)
    codes = torch.tensor([code for _, code in order], dtype=torch.uint8, device=scaled.device)
    middles = (levels[1:] + levels[:-1]) / 2

    def nearest(values: Tensor) -> Tensor:
        below, above = (torch.bucketize(values, middles, right=right, out_int32=True) for right in (False, True))
        low, high = (codes.index_select(0, place) for place in (below, above))
        return torch.where(low % 2 == 0, low, high)

    # Piece by piece, for the search takes 20 bytes a value.
    found = [nearest(piece) for piece in scaled.flatten().split(_SEARCHED)]
    return _in_bytes((torch.cat(found) if found else codes[:0]).view(scaled.shape))


def _in_bytes(codes: Tensor) -> Tensor:
    """Pack codes (X, N, K) of 4 bits two in a byte, the first in the low bits."""
    first, second = codes.unflatten(2, (-1, 2)).unbind(3)
    return first | (second << 4)


def _what(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"
