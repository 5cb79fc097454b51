"""The product of tokens and router: in float32 whatever the layer's dtype, and blind to what lies in padding."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear


def router_logits(
    x_TH: Tensor, router_EH: Tensor, bias_E: Tensor | None, *, valid_T: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return x @ router.T + bias, (T, E), computed and returned in ``dtype``, under autocast too.

    A cohort has one router for each of its C clients, (C, E, H): the first T / C tokens then meet the first, and so on.

    The backward takes tokens of padding as zeros: their logits have a gradient of 0, but 0 x NaN is NaN, and one NaN
    that a kernel left there would make every row of the router's gradient NaN. Nothing of the size of x is kept for
    the backward but x itself; it makes the float32 or masked copy again.

    Args:
        x_TH: tokens, any floating dtype.
        router_EH, bias_E: in any floating dtype; their gradients are in it. Of a cohort (C, E, H) and (C, E).
        valid_T: bool, False = padding; None = every token is real.
        dtype: of the product.
    """
    with without_autocast(x_TH):
        one = router_EH.dim() == 2
        plain = one and x_TH.dtype == router_EH.dtype == dtype and (bias_E is None or bias_E.dtype == dtype)
        if plain and valid_T is None:
            return linear(x_TH, router_EH, bias_E)
        logits_TE: Tensor = _Product.apply(x_TH, router_EH, bias_E, valid_T, dtype)
        return logits_TE


def without_autocast(like: Tensor) -> AbstractContextManager[object]:
    """Turn autocast off for the device of ``like`` where it is on."""
    if not autocasts(like):
        return nullcontext()
    return torch.autocast(like.device.type, enabled=False)


def autocasts(like: Tensor) -> bool:
    """Tell whether autocast is on for the device of ``like``."""
    return like.device.type != "meta" and torch.is_autocast_enabled(like.device.type)


class _Product(torch.autograd.Function):
    """A linear layer whose gradients are those of ``linear``, bit for bit where nothing is cast or masked."""

    @staticmethod
    def forward(
        x_TH: Tensor, router_EH: Tensor, bias_E: Tensor | None, valid_T: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        bias_E = None if bias_E is None else bias_E.to(dtype)
        if router_EH.dim() == 2:
            return linear(x_TH.to(dtype), router_EH.to(dtype), bias_E)
        logits_CTE = _by_client(x_TH, router_EH).to(dtype) @ router_EH.to(dtype).mT
        return (logits_CTE if bias_E is None else logits_CTE.add_(bias_E[:, None])).flatten(0, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x_TH, router_EH, bias_E, valid_T, _ = inputs
        of_x, of_router, *_ = ctx.needs_input_grad  # each gradient needs the other factor
        ctx.save_for_backward(x_TH if of_router else None, router_EH if of_x else None, valid_T)
        ctx.dtypes = x_TH.dtype, router_EH.dtype, None if bias_E is None else bias_E.dtype
        ctx.clients = len(router_EH) if router_EH.dim() == 3 else None

    @staticmethod
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor | None, ...]:
        x_TH, router_EH, valid_T = ctx.saved_tensors
        dx_TH = dw_EH = db_E = None
        with without_autocast(grad_TE):
            grad_TE = grad_TE if ctx.clients is None else grad_TE.unflatten(0, (ctx.clients, -1))
            if ctx.needs_input_grad[0]:
                dx_TH = (grad_TE @ router_EH.to(grad_TE.dtype)).to(ctx.dtypes[0])
                dx_TH = dx_TH if ctx.clients is None else dx_TH.flatten(0, 1)
            if ctx.needs_input_grad[1]:
                real_TH = x_TH if valid_T is None else x_TH.masked_fill(~valid_T[:, None], 0.0)
                real_TH = real_TH if ctx.clients is None else real_TH.unflatten(0, (ctx.clients, -1))
                dw_EH = (grad_TE.mT @ real_TH.to(grad_TE.dtype)).to(ctx.dtypes[1])
            if ctx.needs_input_grad[2]:
                db_E = grad_TE.sum(-2).to(ctx.dtypes[2])
        return dx_TH, dw_EH, db_E, None, None


def _by_client(x_TH: Tensor, router_CEH: Tensor) -> Tensor:
    return x_TH.unflatten(0, (len(router_CEH), -1))
