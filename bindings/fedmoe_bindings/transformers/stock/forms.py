"""What a stock experts module computes, and with which of our activations that is the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from transformers.integrations import moe as stock

from fedmoe_kernels import reference
from fedmoe_kernels.activations import ACTIVATIONS

_FORM = "_fedmoe_form"
_SILU = ("SiLU", "SiLUActivation")
_PROBE_ROWS, _PROBE_WIDTH = 64, 8
# Half of the rows are of size 1, half go up to 30: past every limit that a family of 2026 clamps at (7 to 20). In
# float64; gelu by tanh differs from gelu by 5e-4 of a row's size, a module that computes in float32 inside by 1e-7.
_PROBE_STDS, _PROBE_TOLERANCE = (1.0, 10.0), 1e-6


@dataclass(frozen=True)
class Form:
    """How a stock experts module is laid out and which function stands between its two products.

    Attributes:
        gated: two halves, gate and up, come from the first product.
        transposed: the matrices are (E, in, out), not (E, out, in).
        interleaved: gate and up alternate along the first product, they are not two halves.
        biased: each product has a bias.
        normed: each expert's output goes through the module's ``post_expert_norm``.
        activation: as ``fedmoe_kernels.moe_mlp``; None = none of ours is the same, so the module's own runs between
            two grouped products.
    """

    gated: bool
    transposed: bool
    interleaved: bool
    biased: bool
    normed: bool
    activation: str | None

    @property
    def fused(self) -> bool:
        """Whether ``moe_mlp`` computes the whole of it."""
        return self.activation is not None and not self.normed


def form_of(experts: nn.Module) -> Form:
    """Read a module's layout from its marks, and find its activation by trying it on numbers; remembered there.

    Where no number can be computed (on meta, while compiling) the activation is known only of the plain SwiGLU, and
    nothing is remembered.
    """
    known = getattr(experts, _FORM, None)
    if known is not None:
        return cast(Form, known)
    marks: Any = experts
    layout = (
        bool(marks.has_gate),
        bool(marks.is_transposed),
        bool(marks.has_gate) and not marks.is_concatenated,
        bool(marks.has_bias),
        bool(getattr(marks, "has_post_expert_norm", False)),
    )
    if not _can_try(marks.down_proj):
        return Form(*layout, "swiglu" if _is_plain_swiglu(experts) else None)
    form = Form(*layout, _same_activation(experts, gated=layout[0], interleaved=layout[2]))
    setattr(experts, _FORM, form)
    return form


def _can_try(weight: Tensor) -> bool:
    return not torch.compiler.is_compiling() and weight.device.type != "meta" and detect_fake_mode(weight) is None


def _is_plain_swiglu(experts: nn.Module) -> bool:
    usual: Any = getattr(stock, "_default_apply_gate", None)
    gate: Any = getattr(type(experts), "_apply_gate", None)
    # By name: some releases of transformers have a class of their own for torch's SiLU.
    return gate is not None and gate is usual and type(getattr(experts, "act_fn", None)).__name__ in _SILU


def _same_activation(experts: nn.Module, *, gated: bool, interleaved: bool) -> str | None:
    """The activation of ours that gives the module's numbers on wide random inputs; None = none."""
    module: Any = experts
    width = 2 * _PROBE_WIDTH if gated else _PROBE_WIDTH
    drawn = torch.randn(_PROBE_ROWS, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z_nF = torch.cat([drawn * std for std in _PROBE_STDS]).to(module.down_proj.device)
    with torch.no_grad(), torch.autocast(z_nF.device.type, enabled=False):
        try:
            found = module._apply_gate(z_nF) if gated else module.act_fn(z_nF)
        except (RuntimeError, TypeError, AttributeError):  # it wants another width or dtype than it was given
            return None
        if interleaved:
            z_nF = torch.cat([z_nF[:, ::2], z_nF[:, 1::2]], dim=1)
        for name, ours in ACTIVATIONS.items():
            if ours.gated == gated and _close(found, reference.activate(z_nF, name)):
                return name
    return None


def _close(found: Tensor, ours: Tensor) -> bool:
    if found.shape != ours.shape:
        return False
    size_n = ours.abs().amax(dim=1, keepdim=True).clamp(min=1.0)
    return bool(((found - ours).abs() <= _PROBE_TOLERANCE * size_n).all())
