"""One launch of one kernel as a record: run on a GPU or in the interpreter, or compiled ahead of time as it stands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from triton.tools.tensor_descriptor import TensorDescriptor


@dataclass(frozen=True, eq=False)
class Launch:
    """A kernel with everything it is called with.

    Attributes:
        kernel: the function decorated by `triton.jit`.
        grid: programs along up to three axes; a 0 means that there is nothing to do.
        args: every parameter of the kernel by name, tensors, descriptors, numbers and constants alike.
        warps, stages: as Triton's num_warps and num_stages.
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

    def run(self) -> None:
        """Start it; returns before it has ended on a GPU."""
        if 0 not in self.grid:
            self.kernel[self.grid](**self.args, num_warps=self.warps, num_stages=self.stages)


Execute = Callable[[Launch], None]
"""What drivers do with each launch: `Launch.run`, or a list's `append` to look at them instead."""

__all__ = ["Execute", "Launch", "TensorDescriptor"]
