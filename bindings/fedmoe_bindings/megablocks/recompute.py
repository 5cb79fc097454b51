"""The activation and the second product of the experts, with the activation computed again in the backward.

Shapes: R rows, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fedmoe_kernels import grouped_mm, grouped_outer

Activation = Callable[[Tensor], Tensor]


def activated(activation: Activation, z: Sequence[Tensor]) -> Tensor:
    """Return act(z[0]), times z[1] where there is one: (R, I)."""
    opened_RI = activation(z[0])
    return opened_RI if len(z) == 1 else opened_RI * z[1]


def recomputed(activation: Activation, w2: Tensor, offsets_B1: Tensor, z: Sequence[Tensor]) -> Tensor:
    """Return activated(z) @ w2[e] by row, (R, H), and keep z for the backward, but nothing of width I besides.

    torch's checkpoint would keep the activation, which the product saves, or run the product again.

    Args:
        activation: draws no random numbers.
        w2: (E, I, H), of the dtype of z.
        offsets_B1: as in `grouped_mm`.
        z: one or two of (R, I).
    """
    return _Recomputed.apply(activation, w2, offsets_B1, *z)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, activation: Activation, w2: Tensor, offsets_B1: Tensor, *z: Tensor) -> Tensor:
        kind = z[0].device.type
        ctx.activation = activation
        ctx.autocast = {"device_type": kind, "dtype": torch.get_autocast_dtype(kind)}
        ctx.autocast["enabled"] = torch.is_autocast_enabled(kind)
        ctx.save_for_backward(w2, offsets_B1, *z)
        return grouped_mm(activated(activation, z).to(w2.dtype), w2, offsets_B1, transposed=True)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_RH: Tensor) -> tuple[Tensor | None, ...]:
        w2, offsets_B1, *z = ctx.saved_tensors
        dy_RH = dy_RH.contiguous()
        leaves = [value.detach().requires_grad_() for value in z]
        with torch.enable_grad(), torch.autocast(**ctx.autocast):
            h_RI = activated(ctx.activation, leaves).to(w2.dtype)
        dw2 = grouped_outer(h_RI.detach(), dy_RH, offsets_B1) if ctx.needs_input_grad[1] else None
        if any(ctx.needs_input_grad[3:]):
            # Not autograd.grad: an activation that is a module may have parameters of its own.
            torch.autograd.backward(h_RI, grouped_mm(dy_RH, w2, offsets_B1))
        return None, dw2, None, *(leaf.grad for leaf in leaves)
