"""The experts function that transformers knows as "fedmoe": a stock experts module run on ``moe_mlp``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode

from fedmoe_bindings.transformers.stock.forms import Form, form_of
from fedmoe_bindings.transformers.stock.own_gate import autocast_dtype, by_own_gate
from fedmoe_kernels.experts.moe_mlp import ExpertLora, moe_mlp
from fedmoe_kernels.routing.record import Routing

NAME = "fedmoe"
CHECKED = "_fedmoe_checked"  # on an experts module: it has shown itself equal to eager, or was told not to
LORA = "_fedmoe_lora"  # on an experts module: a function () -> ExpertLora of its live adapters, slot b = expert b
_FEW = 8
# What a right answer may differ by: rounding, and on a GPU TF32. A wrong activation is off by 0.1 and more.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}
_ROUGH = 5e-2


def fedmoe_experts(self: nn.Module, hidden_TH: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Run a stock module's experts; ids outside [0, E) = no row. The function registered under the name "fedmoe".

    The first call of each module runs a few of its tokens by transformers' own eager experts, too, and refuses to go
    on if the two differ. That cannot be done while compiling, on meta, under a CUDA graph, or with adapters.

    Args:
        self: the experts module; transformers calls this function instead of its forward.
        hidden_TH: tokens.
        experts_TK: int64 expert ids.
        weights_TK: routing weights, in the family's own dtype.

    Returns:
        (T, H) in the dtype of ``hidden_TH``.

    Raises:
        RuntimeError: the module computes something else than was made out from it.
    """
    form = form_of(self)
    lora = cast("Callable[[], ExpertLora] | None", getattr(self, LORA, None))
    y_TH = _run(self, form, hidden_TH, experts_TK, weights_TK, lora)
    if not getattr(self, CHECKED, False) and lora is None and may_look(hidden_TH):
        _check(self, hidden_TH.detach(), experts_TK, weights_TK.detach(), y_TH.detach())
    return y_TH


def _run(
    experts: nn.Module,
    form: Form,
    hidden_TH: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    lora: Callable[[], ExpertLora] | None,
) -> Tensor:
    num_experts = cast(Tensor, experts.down_proj).shape[0]
    routing = Routing.from_topk(experts_TK, weights_TK, num_experts)
    if not form.fused:
        if lora is not None:
            raise ValueError(f"{type(experts).__name__} has an activation of its own; leave its adapters to peft")
        return by_own_gate(experts, form, hidden_TH, routing)
    w_in, w_out, bias_in, bias_out = stacked_weights(experts, form)
    if lora is not None:
        w_in, w_out = w_in.detach(), w_out.detach()
        bias_in, bias_out = (None if b is None else b.detach() for b in (bias_in, bias_out))
    x_TH = hidden_TH if autocast_dtype(hidden_TH) is not None else hidden_TH.to(w_in.dtype)
    return moe_mlp(
        x_TH,
        routing,
        w_in,
        w_out,
        activation=cast(str, form.activation),
        bias_in=bias_in,
        bias_out=bias_out,
        lora=None if lora is None else lora(),
    ).to(hidden_TH.dtype)


def stacked_weights(experts: nn.Module, form: Form) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return a module's matrices and biases as ``moe_mlp`` takes them: views where its layout is ours, else copies.

    Returns:
        w_in (E, F, H), w_out (E, H, I), bias_in (E, F) and bias_out (E, H), or None for each bias.
    """
    module: Any = experts
    first = "gate_up_proj" if form.gated else "up_proj"
    w_in, w_out = getattr(module, first), module.down_proj
    bias_in = getattr(module, f"{first}_bias") if form.biased else None
    if form.transposed:
        w_in, w_out = w_in.mT.contiguous(), w_out.mT.contiguous()
    if form.interleaved:
        w_in = halves(w_in)
        bias_in = None if bias_in is None else halves(bias_in)
    return w_in, w_out, bias_in, module.down_proj_bias if form.biased else None


def halves(values: Tensor) -> Tensor:
    """Reorder dimension 1 from gate and up in turn to [gate; up]; a copy."""
    return values.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)


def in_turn(values: Tensor) -> Tensor:
    """Reorder dimension 1 from [gate; up] to gate and up in turn, the inverse of ``halves``; a copy."""
    return values.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


def error_over_rounding(found: Tensor, want: Tensor) -> float | None:
    """By how much two answers differ, relative to their size, if that is more than rounding; 0.0 if not.

    None = there is nothing to tell: all zeros, NaN, or so small that the steps of their dtype are coarser than rounding
    is allowed to be. In float16 that begins at 1e-6 a value, which models of random small weights reach.
    """
    allowed, info = _TOLERANCE.get(found.dtype, _ROUGH), torch.finfo(found.dtype)
    size, step = float(want.double().norm()), info.smallest_normal * info.eps
    if not size > step * want.numel() ** 0.5 / allowed:
        return None
    error = float((found.double() - want.double()).norm()) / size
    return 0.0 if error <= allowed else error


def may_look(hidden_TH: Tensor) -> bool:
    """Say whether numbers can be read now."""
    if torch.compiler.is_compiling() or hidden_TH.device.type == "meta" or detect_fake_mode(hidden_TH) is not None:
        return False
    return not (hidden_TH.is_cuda and torch.cuda.is_current_stream_capturing())


@torch.no_grad()
def _check(experts: nn.Module, hidden_TH: Tensor, experts_TK: Tensor, weights_TK: Tensor, y_TH: Tensor) -> None:
    eager = getattr(type(experts).forward, "__wrapped__", None)
    if eager is None or not hidden_TH.shape[0]:
        return
    few = slice(0, _FEW)
    # Eager experts of some families cannot skip an id outside [0, E); with weight 0 any id is as good.
    here_TK = (experts_TK[few] >= 0) & (experts_TK[few] < cast(Tensor, experts.down_proj).shape[0])
    ids_TK, weights_TK = experts_TK[few].where(here_TK, 0), weights_TK[few].where(here_TK, 0.0)
    error = error_over_rounding(y_TH[few], eager(experts, hidden_TH[few].clone(), ids_TK, weights_TK))
    if error is None:  # the next call looks again
        return
    if error:
        raise RuntimeError(
            f"{type(experts).__name__} differs from its eager experts by {error:.1e} of their size in its first call; "
            "fedmoe misreads this module, so choose another experts implementation, and please report it"
        )
    setattr(experts, CHECKED, True)
