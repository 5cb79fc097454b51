"""Makes Triton's interpreter compute in bfloat16 as a GPU does; as it comes it multiplies raw bits and cuts them off.

Triton 3.6 and 3.7 hold bfloat16 as uint16. Their casts to it round towards zero, their products and sums are of the
integers. Here a cast rounds to nearest, ties to even, a product adds up in its accumulator's float32, and arithmetic on
bfloat16 itself, which GPUs do in more than one way, is refused. float16 is numpy's own and needs none of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Patch = Callable[[Any, str, Any], None]  # of an object, the name of an attribute and its new value: monkeypatch.setattr
_QUIET_NAN = np.uint16(0x7FC0)
# All that computes by numpy on the values of one to three operands. Selections, loads and shapes only move bits.
_ARITHMETIC = ("binary_op", "unary_op", "create_fma", "create_fabs", "create_erf", "create_rsqrt", "create_clampf")


def widened(bits: np.ndarray) -> np.ndarray:
    """Return the float32 values of bfloat16 bits (uint16), exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(values: np.ndarray) -> np.ndarray:
    """Return the bfloat16 bits (uint16) nearest to the values, ties to even; other types become float32 first."""
    with np.errstate(over="ignore"):  # float64 beyond float32 is inf
        values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    # Half of the last kept place, less one where that place is even. Finite values never carry beyond inf.
    nearest = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), _QUIET_NAN, nearest).astype(np.uint16)


def install(patch: Patch) -> None:
    """Change the builder that the interpreter runs every operation by."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast, dot = builder.cast_impl, builder.create_dot

    def is_bfloat16(value: Any) -> bool:
        return value.dtype.scalar == tl.bfloat16

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar == target.scalar:
            return cast(self, source, target)
        if is_bfloat16(source):
            source = handle(widened(source.data), tl.float32)
        if target.scalar == tl.bfloat16:
            return handle(rounded(source.data), tl.bfloat16)
        return cast(self, source, target)

    def create_dot(self: Any, a: Any, b: Any, acc: Any, *how: Any) -> Any:
        a, b = (handle(widened(side.data), tl.float32) if is_bfloat16(side) else side for side in (a, b))
        return dot(self, a, b, acc, *how)

    def refusing(name: str, compute: Any) -> Any:
        def checked(self: Any, *operands: Any) -> Any:
            if any(isinstance(operand, handle) and is_bfloat16(operand) for operand in operands):
                raise TypeError(f"{name} on bfloat16, of whose rounding GPUs differ; cast to float32 first")
            return compute(self, *operands)

        return checked

    patch(builder, "cast_impl", cast_impl)  # every cast of numbers goes through it
    patch(builder, "create_dot", create_dot)
    for name in _ARITHMETIC:
        patch(builder, name, refusing(name, getattr(builder, name)))
