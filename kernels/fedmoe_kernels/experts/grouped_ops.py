"""The operators `fedmoe::grouped_mm` and `fedmoe::grouped_outer`: shapes, derivatives, and which body runs.

They are each other's derivatives, so nothing else is needed for gradients. Both assume inputs that `grouped_mm.py` has
checked: of one dtype and device. The bodies are the loops of `cpu/grouped.py` and the kernels of `gpu/grouped.py`,
which is imported when it is first needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedmoe_kernels.backends import use_triton
from fedmoe_kernels.cpu import grouped as loops
from fedmoe_kernels.operator import Operator, function_of


def _refusal(rows: Tensor) -> str | None:
    """Why the kernels do not serve these rows, None = they do."""
    if rows.shape[0] >= 2**31:
        return f"there are {rows.shape[0]} rows, and they number rows in 32 bits; split them"
    if rows.dtype == torch.float64:
        return "the rows are float64, and they compute in float32; cast them"
    if rows.dtype == torch.bfloat16 and rows.device.type == "cpu":
        return "the rows are bfloat16, whose raw bits Triton's interpreter would multiply; cast them"
    return None


def _bounds(offsets_B1: Tensor, rows: int) -> list[int]:
    """Read the slots' bounds on the host and refuse those that do not fit; one wait for the device."""
    bounds = [int(bound) for bound in offsets_B1.tolist()]
    if bounds[0] != 0 or bounds[-1] > rows or bounds != sorted(bounds):
        raise ValueError(
            f"offsets_B1 is {bounds}; it must begin with 0, never fall and end at the {rows} rows or before"
        )
    return bounds


def _grouped_mm(a_RK: Tensor, w: Tensor, offsets_B1: Tensor, transposed: bool, backend: str) -> Tensor:
    if use_triton(backend, a_RK.device, _refusal(a_RK), verb="grouped_mm"):
        from fedmoe_kernels.gpu import grouped as kernels  # here, because it imports triton

        with torch.cuda.device_of(a_RK):  # Triton launches on the current device, whatever its arguments
            return kernels.rows_product(a_RK, w, offsets_B1, transposed=transposed)
    return loops.rows_product(a_RK, w, _bounds(offsets_B1, a_RK.shape[0]), transposed=transposed)


def _grouped_outer(left_RP: Tensor, right_RQ: Tensor, offsets_B1: Tensor, backend: str) -> Tensor:
    if use_triton(backend, left_RP.device, _refusal(left_RP), verb="grouped_outer"):
        from fedmoe_kernels.gpu import grouped as kernels  # here, because it imports triton

        with torch.cuda.device_of(left_RP):
            return kernels.outer_product(left_RP, right_RQ, offsets_B1)
    return loops.outer_product(left_RP, right_RQ, _bounds(offsets_B1, left_RP.shape[0]))


_DEVICES = ("cpu", "cuda")
grouped_mm_op = torch.library.custom_op("fedmoe::grouped_mm", _grouped_mm, mutates_args=(), device_types=_DEVICES)
grouped_outer_op = torch.library.custom_op(
    "fedmoe::grouped_outer", _grouped_outer, mutates_args=(), device_types=_DEVICES
)


@grouped_mm_op.register_fake
def _(a_RK: Tensor, w: Tensor, _offsets_B1: Tensor, transposed: bool, _backend: str) -> Tensor:
    return a_RK.new_empty(a_RK.shape[0], w.shape[2 if transposed else 1])


@grouped_outer_op.register_fake
def _(left_RP: Tensor, right_RQ: Tensor, offsets_B1: Tensor, _backend: str) -> Tensor:
    return left_RP.new_empty(offsets_B1.shape[0] - 1, left_RP.shape[1], right_RQ.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.transposed, ctx.backend = inputs if len(inputs) == 5 else (*inputs[:3], False, inputs[3])
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _differentiate_mm(ctx: Any, wanted: Sequence[bool], dy_RN: Tensor | None) -> tuple[Tensor | None, ...]:
    """dA = dY @ w, or dY @ w.T if transposed; dW = dY.T @ A, or A.T @ dY if transposed."""
    if dy_RN is None:
        return (None,) * 5
    a_RK, w, offsets_B1 = ctx.saved_tensors
    dy_RN, da_RK, dw = dy_RN.contiguous(), None, None
    if wanted[0]:
        da_RK = grouped_mm(dy_RN, w, offsets_B1, not ctx.transposed, ctx.backend)
    if wanted[1]:
        left, right = (a_RK, dy_RN) if ctx.transposed else (dy_RN, a_RK)
        dw = grouped_outer(left, right, offsets_B1, ctx.backend)
    return da_RK, dw, None, None, None


def _differentiate_outer(ctx: Any, wanted: Sequence[bool], d_BPQ: Tensor | None) -> tuple[Tensor | None, ...]:
    """dL = R @ dO.T and dR = L @ dO."""
    if d_BPQ is None:
        return (None,) * 4
    left_RP, right_RQ, offsets_B1 = ctx.saved_tensors
    d_BPQ = d_BPQ.contiguous()
    dleft_RP = grouped_mm(right_RQ, d_BPQ, offsets_B1, False, ctx.backend) if wanted[0] else None
    dright_RQ = grouped_mm(left_RP, d_BPQ, offsets_B1, True, ctx.backend) if wanted[1] else None
    return dleft_RP, dright_RQ, None, None


grouped_mm_op.register_autograd(
    lambda ctx, dy_RN: _differentiate_mm(ctx, ctx.needs_input_grad, dy_RN), setup_context=_save
)
grouped_outer_op.register_autograd(
    lambda ctx, d_BPQ: _differentiate_outer(ctx, ctx.needs_input_grad, d_BPQ), setup_context=_save
)


grouped_mm = Operator(grouped_mm_op, _grouped_mm, function_of("GroupedMm", _grouped_mm, _save, _differentiate_mm))
grouped_outer = Operator(
    grouped_outer_op, _grouped_outer, function_of("GroupedOuter", _grouped_outer, _save, _differentiate_outer)
)
