"""nf4 as bitsandbytes stores it: weights in one flat row, blocks of 64 with a largest magnitude each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd, prod

import torch
from torch import Tensor

from fedmoe_kernels.formats import NF4
from fedmoe_kernels.quantized import Quantized

_STEP = 32  # columns that the kernels read at once
_STATE = "quant_state.bitsandbytes__nf4"


@dataclass(frozen=True, eq=False)
class Nf4:
    """One weight of a state dict of bitsandbytes, a matrix or the stacked matrices of all experts.

    Attributes:
        packed: (weights / 2,) uint8 of all rows end to end, the first of two weights in the high four bits.
        absmax: float32, the largest magnitude of every block; nested statistics are decoded.
        shape: (N, K) or (E, N, K).
        blocksize: weights of a block.
        dtype: that the weight had.
    """

    packed: Tensor
    absmax: Tensor
    shape: tuple[int, ...]
    blocksize: int
    dtype: torch.dtype

    def quantized(self) -> Quantized:
        """Return (E, N, K), E = 1 for a matrix; every code and every magnitude is kept.

        A block is a run of 64 weights wherever rows end. Where 64 does not divide K but 32 does, blocks of fewer
        columns repeat a block's magnitude.

        Raises:
            ValueError: 32 does not divide K, or a block; then only ``plain`` can decode it.
        """
        *stack, N, K = self.shape
        columns = gcd(K, self.blocksize)
        if columns % _STEP:
            raise ValueError(
                f"rows of {K} weights in blocks of {self.blocksize} have no run of {_STEP} under one scale; decode "
                "them with plain() and quantise them again"
            )
        X = prod(stack)
        starts = torch.arange(0, X * N * K, columns, device=self.packed.device)
        scale = self.absmax[starts // self.blocksize].view(X, N, K // columns)
        codes = (self.packed >> 4) | (self.packed << 4)
        return Quantized(codes.view(X, N, K // 2), scale, "nf4")

    def plain(self, dtype: torch.dtype | None = None) -> Tensor:
        """Decode once, to ``shape``; a product in float32, rounded once to ``dtype`` (None = the dtype it had)."""
        levels = torch.tensor(NF4, dtype=torch.float32, device=self.packed.device)
        codes = torch.stack([self.packed >> 4, self.packed & 15], 1).flatten()
        blocks = torch.arange(codes.numel(), device=codes.device) // self.blocksize
        return (levels[codes.int()] * self.absmax[blocks]).view(self.shape).to(dtype or self.dtype)


def read_nf4(tensors: Mapping[str, Tensor], name: str) -> Nf4:
    """Read one weight of a state dict, its statistics decoded where they are nested (double quantisation).

    Args:
        tensors: of a checkpoint: ``{name}``, ``{name}.absmax``, ``{name}.quant_map``, ``{name}.quant_state...`` and,
            where nested, ``{name}.nested_absmax`` and ``{name}.nested_quant_map``.
        name: of the weight, as ``model.layers.0.mlp.experts.down_proj`` or ``...gate_proj.weight``.

    Raises:
        ValueError: a tensor is missing or does not fit, the format is another, or its levels are not those of nf4.
    """

    def tensor(part: str) -> Tensor:
        key = f"{name}.{part}" if part else name
        if key not in tensors:
            raise ValueError(f"the state has no {key}; {name} is not stored as nf4 of bitsandbytes")
        return tensors[key]

    said = json.loads(bytes(tensor(_STATE).tolist()))
    shape, blocksize = tuple(int(size) for size in said["shape"]), int(said["blocksize"])
    levels = tensor("quant_map").float()
    if levels.shape != (16,) or not torch.equal(levels.cpu(), torch.tensor(NF4)):
        raise ValueError(f"{name}.quant_map has other levels than nf4; decode the weight with the library that made it")
    absmax = tensor("absmax")
    if "nested_blocksize" in said:
        runs = torch.arange(absmax.numel(), device=absmax.device) // int(said["nested_blocksize"])
        coarse = tensor("nested_quant_map").float()[absmax.int()] * tensor("nested_absmax").float()[runs]
        absmax = coarse + torch.tensor(said["nested_offset"], dtype=torch.float32, device=absmax.device)
    packed, count = tensor("").view(torch.uint8).flatten(), prod(shape)
    if len(shape) not in (2, 3) or 2 * packed.numel() != count or absmax.numel() != -(-count // blocksize):
        raise ValueError(
            f"{name} has {packed.numel()} bytes and {absmax.numel()} magnitudes; {shape} in blocks of {blocksize} "
            f"needs {-(-count // 2)} and {-(-count // blocksize)} and two or three axes"
        )
    return Nf4(packed, absmax.float(), shape, blocksize, getattr(torch, said["dtype"]))
