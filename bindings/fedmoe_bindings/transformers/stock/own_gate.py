"""Experts whose activation is none of ours: two grouped products with the module's own function between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fedmoe_bindings.transformers.stock.forms import Form
from fedmoe_kernels.experts.grouped_mm import grouped_mm
from fedmoe_kernels.routing.record import Routing


def by_own_gate(experts: nn.Module, form: Form, hidden_TH: Tensor, routing: Routing) -> Tensor:
    """Run a stock experts module, (T, H) in the dtype of ``hidden_TH``."""
    module: Any = experts
    first = "gate_up_proj" if form.gated else "up_proj"
    w_in, w_out = getattr(module, first), module.down_proj
    return grouped_experts(
        hidden_TH,
        routing,
        w_in.mT if form.transposed else w_in,
        w_out.mT if form.transposed else w_out,
        module._apply_gate if form.gated else module.act_fn,
        bias_in=getattr(module, f"{first}_bias") if form.biased else None,
        bias_out=module.down_proj_bias if form.biased else None,
        after=module.post_expert_norm if form.normed else None,
    )


def grouped_experts(
    x_TH: Tensor,
    routing: Routing,
    w_in: Tensor,
    w_out: Tensor,
    between: Callable[[Tensor], Tensor],
    *,
    bias_in: Tensor | None = None,
    bias_out: Tensor | None = None,
    after: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Run experts on rows sorted by expert, (T, H) in the dtype of x.

    What stands between the products, and after them, sees all rows at once, as in transformers' own grouped experts.
    Rows without an expert are zeros throughout.

    Args:
        x_TH: tokens.
        routing: which of them go to which expert.
        w_in, w_out: (E, F, H) and (E, H, I), of any strides.
        between: (R, F) -> (R, I), row by row.
        bias_in, bias_out: (E, F) and (E, H).
        after: (R, H) -> (R, H), row by row, before the routing weights.
    """
    live_R1 = (routing.tokens_R >= 0)[:, None]
    expert_R = _expert_of_row(routing)
    z_RF = _product(x_TH[routing.tokens_R.clamp(min=0)].where(live_R1, 0.0), w_in, routing)
    if bias_in is not None:
        z_RF = z_RF + bias_in.to(z_RF.dtype)[expert_R]
    y_RH = _product(between(z_RF).where(live_R1, 0.0), w_out, routing)
    if bias_out is not None:
        y_RH = y_RH + bias_out.to(y_RH.dtype)[expert_R]
    if after is not None:
        y_RH = after(y_RH)
    y_RH = y_RH.where(live_R1, 0.0)
    y_TKH = y_RH[routing.rows_TK.clamp(min=0)] * routing.weights_TK[..., None]
    return y_TKH.sum(dim=1).to(x_TH.dtype)


def _expert_of_row(routing: Routing) -> Tensor:
    """(R,) the slot of each row; the last one for rows without an expert."""
    rows_R = torch.arange(routing.tokens_R.shape[0], device=routing.tokens_R.device)
    slots_R = torch.searchsorted(routing.offsets_B1[1:].contiguous(), rows_R, right=True)
    return slots_R.clamp(max=routing.num_slots - 1)


def _product(a_RK: Tensor, weight: Tensor, routing: Routing) -> Tensor:
    """a @ w[slot].T for every row, 0 for rows without an expert; without a copy of either layout."""
    if autocast_dtype(a_RK) is None:
        a_RK = a_RK.to(weight.dtype)
    if weight.mT.is_contiguous() and not weight.is_contiguous():
        return grouped_mm(a_RK, weight.mT, routing.offsets_B1, transposed=True)
    return grouped_mm(a_RK, weight, routing.offsets_B1)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast makes of a product with ``x`` now; None = nothing."""
    kind = x.device.type
    if kind == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)
