"""mxfp4 as gpt-oss stores it: 32 weights in 16 bytes beside a power of two, rows of gate and up in turn."""

from __future__ import annotations

import torch
from torch import Tensor

from fedmoe_bindings.quantized.rows import rows_in_turn, sorted_rows
from fedmoe_kernels.quantized import Quantized

_BYTES = 16  # of the 32 weights that share a scale
_NAN = 255  # the one scale of E8M0 that is not a number


def read_mxfp4(blocks: Tensor, scales: Tensor, *, gated: bool) -> Quantized:
    """Take a checkpoint's two tensors as they are; no weight is decoded, and none changes.

    Args:
        blocks: ``*_blocks``, (E, rows, groups, 16) uint8, the weight of the even column in the low four bits.
        scales: ``*_scales``, (E, rows, groups) uint8: s stands for 2 ** (s - 127).
        gated: rows of gate and up in turn (``gate_up_proj``), which are sorted; a bias needs ``rows.sorted_rows``.

    Returns:
        (E, rows, 32 * groups): w_in (E, F, H) or w_out (E, H, I). The same weights that transformers decodes and then
        turns to (E, H, F) and (E, I, H).

    Raises:
        ValueError: other shapes or dtypes, or a scale that is not a number.
    """
    if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8 or blocks.shape != (*scales.shape, _BYTES):
        raise ValueError(
            f"blocks are {blocks.dtype} {tuple(blocks.shape)}, scales {scales.dtype} {tuple(scales.shape)}; they must "
            "be uint8 (E, rows, groups, 16) and (E, rows, groups)"
        )
    if scales.dim() != 3 or (gated and scales.shape[1] % 2):
        raise ValueError(f"scales are {tuple(scales.shape)}; they must be (E, rows, groups), gated with even rows")
    if bool((scales == _NAN).any()):
        raise ValueError("a scale is 255, which stands for NaN; the file is damaged, get it again")
    codes = blocks.flatten(2)
    if gated:
        codes, scales = sorted_rows(codes), sorted_rows(scales)
    return Quantized(codes.contiguous(), scales.contiguous().view(torch.float8_e8m0fnu), "mxfp4")


def write_mxfp4(weights: Quantized, *, gated: bool) -> tuple[Tensor, Tensor]:
    """Return ``*_blocks`` and ``*_scales`` as gpt-oss has them; ``read_mxfp4`` the other way round.

    Raises:
        ValueError: another format, or blocks of more than 32 columns.
    """
    if weights.format != "mxfp4" or weights.block != (1, 2 * _BYTES):
        raise ValueError(f"weights are {weights.format} in blocks of {weights.block}; gpt-oss has mxfp4 in (1, 32)")
    codes, scales = weights.codes, weights.scale.view(torch.uint8)
    if gated:
        codes, scales = rows_in_turn(codes), rows_in_turn(scales)
    return codes.unflatten(2, (-1, _BYTES)).contiguous(), scales.contiguous()
