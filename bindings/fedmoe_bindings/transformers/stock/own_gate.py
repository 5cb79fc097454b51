"""Experts whose activation is none of ours: two grouped products with the module's own function between them."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch.nn.functional import grouped_mm

from fedmoe_bindings.transformers.stock.forms import Form
from fedmoe_kernels.routing.record import Routing


def by_own_gate(experts: nn.Module, form: Form, hidden_TH: Tensor, routing: Routing) -> Tensor:
    """Run the experts on rows sorted by expert, (T, H) in the dtype of ``hidden_TH``.

    The module's gate, and its norm after each expert, see all rows at once, as in transformers' own grouped experts.
    Rows without an expert are zeros throughout.
    """
    module: Any = experts
    first = "gate_up_proj" if form.gated else "up_proj"
    live_R1 = (routing.tokens_R >= 0)[:, None]
    expert_R = _expert_of_row(routing)
    z_RF = hidden_TH[routing.tokens_R.clamp(min=0)].where(live_R1, 0.0)
    z_RF = _product(z_RF, getattr(module, first), routing, form)
    if form.biased:
        z_RF = z_RF + getattr(module, f"{first}_bias").to(z_RF.dtype)[expert_R]
    h_RI = (module._apply_gate(z_RF) if form.gated else module.act_fn(z_RF)).where(live_R1, 0.0)
    y_RH = _product(h_RI, module.down_proj, routing, form)
    if form.biased:
        y_RH = y_RH + module.down_proj_bias.to(y_RH.dtype)[expert_R]
    if form.normed:
        y_RH = module.post_expert_norm(y_RH)
    y_RH = y_RH.where(live_R1, 0.0)
    y_TKH = y_RH[routing.rows_TK.clamp(min=0)] * routing.weights_TK[..., None]
    return y_TKH.sum(dim=1).to(hidden_TH.dtype)


def _expert_of_row(routing: Routing) -> Tensor:
    """(R,) the slot of each row; the last one for rows without an expert."""
    rows_R = torch.arange(routing.tokens_R.shape[0], device=routing.tokens_R.device)
    slots_R = torch.searchsorted(routing.offsets_B1[1:].contiguous(), rows_R, right=True)
    return slots_R.clamp(max=routing.num_slots - 1)


def _product(a_RK: Tensor, weight: Tensor, routing: Routing, form: Form) -> Tensor:
    """a @ w[slot].T for every row, 0 for rows without an expert; the weight in the module's own layout."""
    if (dtype := autocast_dtype(a_RK)) is not None:
        a_RK, weight = a_RK.to(dtype), weight.to(dtype)
    a_RK, w_BKN = a_RK.to(weight.dtype), weight if form.transposed else weight.mT
    ends_B = routing.offsets_B1[1:].to(torch.int32)
    live_R1 = (routing.tokens_R >= 0)[:, None]
    if _torch_can(a_RK, w_BKN):
        return grouped_mm(a_RK, w_BKN, offs=ends_B).where(live_R1, 0.0)
    # transformers' operator: a loop over experts that a compiler does not look into.
    return cast(Tensor, torch.ops.transformers.grouped_mm_fallback(a_RK, w_BKN, ends_B))


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast makes of a product with ``x`` now; None = nothing."""
    kind = x.device.type
    if kind == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def _torch_can(a_RK: Tensor, w_BKN: Tensor) -> bool:
    """Whether torch's grouped product takes these: rows of 16 bytes, no float64, without numbers bfloat16."""
    hollow = torch.compiler.is_compiling() or a_RK.device.type == "meta" or detect_fake_mode(a_RK) is not None
    if a_RK.dtype == torch.float64 or (hollow and a_RK.dtype != torch.bfloat16):
        return False
    return all(size * a_RK.itemsize % 16 == 0 for size in w_BKN.shape[1:])
