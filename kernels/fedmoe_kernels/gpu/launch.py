"""One launch of one kernel as a record: run on a GPU or in the interpreter, or compiled ahead of time as it stands."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from operator import itemgetter
from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from fedmoe_kernels.tiles.lookup import Tile


@dataclass(frozen=True, eq=False)
class Launch:
    """A kernel with everything it is called with.

    Attributes:
        kernel: the function decorated by `triton.jit`.
        grid: programs along up to three axes; a 0 means that there is nothing to do.
        args: every parameter of the kernel by name, tensors, descriptors, numbers and constants alike.
        warps, stages: as Triton's num_warps and num_stages.
        registers: as Triton's maxnreg; 0 = as many as the compiler likes.
        flops: multiplications and additions of its products, twice the multiply-adds; for predictions.
        bytes: the least it must move to and from memory; for predictions.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: Mapping[str, Any]
    warps: int
    stages: int
    flops: int = 0
    bytes: int = 0
    registers: int = 0

    @property
    def name(self) -> str:
        """The kernel's name, after its file's where they differ."""
        function = self.kernel.fn
        file, kernel = function.__module__.rsplit(".", 1)[-1], function.__qualname__.strip("_").removesuffix("_kernel")
        return kernel if kernel == file else f"{file}.{kernel}"

    @property
    def options(self) -> dict[str, int]:
        """What Triton is told besides the arguments."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return {**options, "maxnreg": self.registers} if self.registers else options

    def run(self) -> None:
        """Start it; returns before it has ended on a GPU.

        By position: Triton copies what is given by name on its way to the launcher, 13 of 63 us for 39 arguments.
        """
        if 0 not in self.grid:
            self.kernel[self.grid](*_in_order(self.kernel.fn)(self.args), **self.options)


@cache
def _in_order(function: Callable[..., None]) -> Callable[[Mapping[str, Any]], tuple[Any, ...]]:
    """What picks the arguments of a kernel, by name, in the order of its parameters; every kernel has two at least."""
    return itemgetter(*inspect.signature(function).parameters)


def cdiv(total: int, size: int) -> int:
    """Count blocks of `size` to cover `total`; triton.cdiv takes 2 to 6 us outside a kernel, a call has 30 of them."""
    return -(-total // size)


def power_of_2(least: int) -> int:
    """Return the smallest power of two from `least` on."""
    return 1 << max(0, least - 1).bit_length()


def dot_precision(dtype: torch.dtype) -> str:
    """Return `input_precision` for products of `dtype`: "tf32" for float32 where torch allows it, "ieee" otherwise.

    torch is asked by `fp32_precision`: reading the older `allow_tf32` raises once the newer setting was used. Products
    of other types take no precision, and "tf32" would be refused for them on some targets.
    """
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


def row_constants(tile: Tile, dtype: torch.dtype, *, tma: bool) -> dict[str, Any]:
    """Return the constants that kernels over rows take from their tile; `tma` where all descriptors can be made."""
    sizes = {"BM": tile.m, "BN": tile.n, "BK": tile.k, "GROUP": tile.group}
    return {**sizes, "TMA": tma, "PRECISION": dot_precision(dtype)}


Execute = Callable[[Launch], None]
"""What drivers do with each launch: `Launch.run`, or a list's `append` to look at them instead."""


def start(launches: Iterable[Launch], execute: Execute) -> None:
    """Execute launches in their order."""
    for launch in launches:
        execute(launch)


__all__ = ["Execute", "Launch", "TensorDescriptor", "cdiv", "dot_precision", "power_of_2", "row_constants", "start"]
