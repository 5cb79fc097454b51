"""Frozen weights in few bits as the kernels read them: a block of codes decoded on its way into a product, or slots
decoded to a buffer, which a product over many rows then reads as plain weights.

Formats and the meaning of their codes: `fedmoe_kernels.formats`. Shapes: X matrices of N x K.
"""

from __future__ import annotations

from math import gcd
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedmoe_kernels.formats import NF4
from fedmoe_kernels.gpu.launch import Launch, cdiv

_ROWS, _COLUMNS = 16, 256
_NF4 = tl.constexpr(NF4)


@triton.jit
def _e4m3_pair(pair):
    """(low, high) in float32 of a uint32 with two bytes of float8_e4m3fn; NaN where all bits below a sign are set.

    Both are laid into halves of the register as float16 has its bits, of which 2 ** 8 is the difference in bias. So a
    loop of products has 12 instructions a weight on sm_90, and 15 where bytes are decoded one by one.
    """
    lanes = (pair & 0xFF) | ((pair & 0xFF00) << 8)
    magnitude = lanes & 0x007F007F
    nan = ((magnitude + 0x00010001) & 0x00800080) * 0xFC
    return _halves((magnitude << 7) | ((lanes & 0x00800080) << 8) | nan, 256.0)


@triton.jit
def _e2m1_pair(pair):
    """(low, high) in float32 of a uint32 with two codes of e2m1: sign, two bits of exponent, one of mantissa."""
    lanes = (pair & 0xF) | ((pair & 0xF0) << 12)
    return _halves(((lanes & 0x00070007) << 9) | ((lanes & 0x00080008) << 12), 16384.0)


@triton.jit
def _halves(lanes, times: tl.constexpr):
    """The two float16 in a uint32, each times a power of two, in float32: exact, subnormal numbers included."""
    low = lanes.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * times
    high = (lanes >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * times
    return low, high


@triton.jit
def _e8m0(byte):
    """2 ** (byte - 127) in float32, NaN for 255."""
    byte = byte.to(tl.uint32)
    power = tl.where(byte == 0, 1 << 22, byte << 23).to(tl.uint32)
    return tl.where(byte == 255, float("nan"), power.to(tl.float32, bitcast=True))


@triton.jit
def _level(code, LEVELS: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """LEVELS[FIRST + code % COUNT], chosen bit by bit: 15 selections for 16 levels, and no memory."""
    if COUNT == 2:
        return tl.where((code & 1) == 0, LEVELS[FIRST], LEVELS[FIRST + 1])
    else:
        HALF: tl.constexpr = COUNT // 2
        low = _level(code, LEVELS, FIRST, HALF)
        return tl.where((code & HALF) == 0, low, _level(code, LEVELS, FIRST + HALF, HALF))


@triton.jit
def _values(pairs, FORMAT: tl.constexpr):
    """What codes stand for, in float32: (X, J) pairs as they are stored -> (X, J, 2)."""
    if FORMAT == "int8":
        return tl.join(pairs.to(tl.int8), (pairs >> 8).to(tl.int8)).to(tl.float32)
    elif FORMAT == "fp8_e4m3":
        low, high = _e4m3_pair(pairs.to(tl.uint16, bitcast=True).to(tl.uint32))
        return tl.join(low, high)
    elif FORMAT == "int4":
        return (tl.join(pairs & 15, pairs >> 4).to(tl.int8) - 8).to(tl.float32)
    elif FORMAT == "nf4":
        return _level(tl.join(pairs & 15, pairs >> 4), _NF4, 0, 16)
    else:
        low, high = _e2m1_pair(pairs.to(tl.uint32))
        return tl.join(low, high)


@triton.jit
def scales(
    scale, rows, inside, c0, C: tl.constexpr, BC: tl.constexpr, SHARE: tl.constexpr, TALL: tl.constexpr
):  # fmt: skip
    """The stored scales of columns c0..c0 + BC - 1 of some rows of codes: (X, groups), 0 outside.

    Read a step before they are needed: of one byte, they cannot be fetched ahead by the pipeliner, as the codes are.

    Args:
        scale: rows of C / SHARE, each for TALL rows of codes.
        rows: (X,) int64; `inside` (X,) bool, which of them exist.
        SHARE: columns that share a scale; it divides BC, or BC divides it.
    """
    GROUPS: tl.constexpr = BC // SHARE if BC > SHARE else 1
    group = c0 // SHARE + tl.arange(0, GROUPS)
    places = scale + (rows // TALL)[:, None] * (C // SHARE) + group[None, :]
    return tl.load(places, mask=inside[:, None] & (group < C // SHARE)[None, :], other=0)


@triton.jit
def decoded(
    codes, stored, whole, rows, inside, c0, C: tl.constexpr, X: tl.constexpr, BC: tl.constexpr,
    SHARE: tl.constexpr, FORMAT: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Columns c0..c0 + BC - 1 of X rows of stacked codes, times their scales: (X, BC) float32, 0 outside.

    Args:
        codes: rows of C / 2 numbers with columns 2j and 2j + 1 each, low bits first: int16 of two bytes, or uint8 of
            two codes. Bytes loaded one by one would be gathered by the threads that multiply them on chips without
            wgmma (255 registers and spills); pairs are loaded in wide rows.
        stored: from `scales`.
        whole: what all are multiplied by besides, a number; None in formats without.
        rows: (X,) int64; `inside` (X,) bool, which of them exist.
        WHOLE: whether all columns and rows do.
    """
    GROUPS: tl.constexpr = BC // SHARE if BC > SHARE else 1
    pair = c0 // 2 + tl.arange(0, BC // 2)
    places = codes + rows[:, None] * (C // 2) + pair[None, :]
    if WHOLE:  # noqa: SIM108 - one branch is compiled
        block = tl.load(places)
    else:
        # Outside, the product is 0: either the code 0 stands for 0, or the scale 0 does.
        block = tl.load(places, mask=inside[:, None] & (pair < C // 2)[None, :], other=0)
    if FORMAT == "mxfp4":
        factor = _e8m0(stored)
    elif FORMAT == "nvfp4":
        factor, _ = _e4m3_pair(stored.to(tl.uint32))
    else:
        factor = stored
    if whole is not None:
        factor *= whole
    value = _values(block, FORMAT).reshape(X, GROUPS, BC // GROUPS) * factor[:, :, None]
    return value.reshape(X, BC)


@triton.jit
def code_rows(index, n0, k0, N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
              TRANSPOSED: tl.constexpr):  # fmt: skip
    """(rows, inside, first column) of the block at (k0, n0) of matrix `index`: of a stack (X, N, K), or (X, K, N)."""
    if TRANSPOSED:
        k = k0 + tl.arange(0, BK)
        return index.to(tl.int64) * K + k, k < K, n0
    else:
        n = n0 + tl.arange(0, BN)
        return index.to(tl.int64) * N + n, n < N, k0


@triton.jit
def scale_block(
    scale, index, n0, k0, N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    TRANSPOSED: tl.constexpr, SHARE: tl.constexpr, TALL: tl.constexpr,
):  # fmt: skip
    """The scales of `decoded_block` at the same place."""
    rows, inside, c0 = code_rows(index, n0, k0, N, K, BN, BK, TRANSPOSED)
    if TRANSPOSED:
        return scales(scale, rows, inside, c0, N, BN, SHARE, TALL)
    else:
        return scales(scale, rows, inside, c0, K, BK, SHARE, TALL)


@triton.jit
def decoded_block(
    codes, stored, whole, index, n0, k0, N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    TRANSPOSED: tl.constexpr, SHARE: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """As `blocks.weight_block`, in float32, of codes (X, N, K), or (X, K, N) when TRANSPOSED, paired along the last."""
    rows, inside, c0 = code_rows(index, n0, k0, N, K, BN, BK, TRANSPOSED)
    WHOLE: tl.constexpr = N % BN == 0 and K % BK == 0
    if TRANSPOSED:
        return decoded(codes, stored, whole, rows, inside, c0, N, BK, BN, SHARE, FORMAT, WHOLE)
    else:
        return decoded(codes, stored, whole, rows, inside, c0, K, BN, BK, SHARE, FORMAT, WHOLE).T


@triton.jit
def _decode_kernel(
    codes, scale, whole, out, N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SHARE: tl.constexpr, TALL: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """One block of BN rows by BK columns of one matrix."""
    COLUMNS: tl.constexpr = (K + BK - 1) // BK
    BLOCKS: tl.constexpr = (N + BN - 1) // BN
    block = tl.program_id(0) // COLUMNS
    k0 = tl.program_id(0) % COLUMNS * BK
    index = block // BLOCKS
    n = block % BLOCKS * BN + tl.arange(0, BN)
    rows = index.to(tl.int64) * N + n
    if whole is not None:
        whole = tl.load(whole + index)
    stored = scales(scale, rows, n < N, k0, K, BK, SHARE, TALL)
    WHOLE: tl.constexpr = N % BN == 0 and K % BK == 0
    value = decoded(codes, stored, whole, rows, n < N, k0, K, BN, BK, SHARE, FORMAT, WHOLE)
    k = k0 + tl.arange(0, BK)
    places = out + rows[:, None] * K + k[None, :]
    tl.store(places, value.to(out.dtype.element_ty), mask=(n < N)[:, None] & (k < K)[None, :])


class Codes(NamedTuple):
    """How frozen matrices are stored besides their codes.

    Attributes:
        format: a name of `formats.FORMATS`.
        scale: (X, N / rows, K / columns), of the format's dtype.
        whole: (X,) float32, each matrix's own scale, where the format has one.
    """

    format: str
    scale: Tensor
    whole: Tensor | None

    def of(self, first: int, stop: int) -> Codes:
        """Return those of some matrices."""
        whole = None if self.whole is None else self.whole[first:stop]
        return Codes(self.format, self.scale[first:stop], whole)

    def share(self, w: Tensor) -> int:
        """Return how many columns of the pairs `w` share a scale."""
        return 2 * w.shape[2] // self.scale.shape[2]

    def arguments(self, w: Tensor) -> dict[str, Any]:
        """Return a kernel's arguments for the pairs `w`; Triton knows no scale of 8 bits."""
        scale = self.scale if self.scale.dtype == torch.float32 else self.scale.view(torch.uint8)
        block = {"SHARE": self.share(w), "TALL": w.shape[1] // scale.shape[1]}
        return {"scale": scale, "whole": self.whole, "FORMAT": self.format, **block}


PLAIN: dict[str, Any] = {"scale": None, "whole": None, "FORMAT": "", "SHARE": 1, "TALL": 1}
"""The same arguments for plain numbers."""


def in_pairs(codes: Tensor) -> Tensor:
    """View codes as the kernels read them, two at once: 8-bit ones as int16."""
    return codes if codes.dtype == torch.uint8 else codes.view(torch.int16)


def within(size: int, share: int) -> int:
    """Cut a block of `size` columns so that it meets whole groups of `share` columns or lies within one."""
    return size if size % share == 0 else gcd(size, share)


def decode(frozen: Tensor, codes: Codes, out_XNK: Tensor) -> Launch:
    """Write what the codes of X matrices stand for, each rounded once to the dtype of `out_XNK`."""
    (slots, N, K), pairs = out_XNK.shape, in_pairs(frozen)
    how = codes.arguments(pairs)
    width = within(_COLUMNS, how["SHARE"])
    grid = (slots * cdiv(N, _ROWS) * cdiv(K, width),)
    args = {"codes": pairs, "out": out_XNK, "N": N, "K": K, "BN": _ROWS, "BK": width, **how}
    moved = frozen.nbytes + codes.scale.nbytes + out_XNK.nbytes
    return Launch(_decode_kernel, grid, args, warps=4, stages=1, bytes=moved)
