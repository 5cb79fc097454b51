"""What a stock experts module computes, and with which of our activations that is the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from transformers.integrations import moe as stock

from fedmoe_kernels import reference
from fedmoe_kernels.activations import ACTIVATIONS, DEFAULT_LIMITS

_FORM, _FOUND = "_fedmoe_form", "_fedmoe_activation"
_SILU = ("SiLU", "SiLUActivation")
_PROBE_ROWS, _PROBE_WIDTH = 64, 8
# A third of the rows are of size 1, a third go up to 30, past every limit that a family of 2026 clamps at (7 to 20),
# and a third up to 3,000, past what a limit can be and still matter. In float64; gelu by tanh differs from gelu by 5e-4
# of a row's size, a module that computes in float32 inside by 1e-7.
_PROBE_STDS, _PROBE_TOLERANCE = (1.0, 10.0, 1000.0), 1e-6
_FAR = 1e6  # an input at which whatever clamps does


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
    between = marks._apply_gate if layout[0] else marks.act_fn
    same = _same_activation(between, marks.down_proj.device, gated=layout[0], interleaved=layout[2])
    form = Form(*layout, same)
    setattr(experts, _FORM, form)
    return form


def _can_try(weight: Tensor) -> bool:
    return not torch.compiler.is_compiling() and weight.device.type != "meta" and detect_fake_mode(weight) is None


def _is_plain_swiglu(experts: nn.Module) -> bool:
    usual: Any = getattr(stock, "_default_apply_gate", None)
    gate: Any = getattr(type(experts), "_apply_gate", None)
    # By name: some releases of transformers have a class of their own for torch's SiLU.
    return gate is not None and gate is usual and type(getattr(experts, "act_fn", None)).__name__ in _SILU


def activation_of(
    owner: nn.Module, act: Callable[[Tensor], Tensor], weight: Tensor, *, gated: bool = False
) -> str | None:
    """Find which of our activations a function is, on its own or as the gate; None = none, or not to be tried now.

    Args:
        owner: the module that remembers the answer.
        act: the function.
        weight: where and how it is run.
        gated: its answer is multiplied by the other half of its input.
    """
    known = getattr(owner, _FOUND, None)
    if known is not None:
        return cast("str | None", known[0])
    if not _can_try(weight):
        return None

    def whole(z_nF: Tensor) -> Tensor:
        if not gated:
            return act(z_nF)
        gate_nI, up_nI = z_nF.chunk(2, dim=-1)
        return act(gate_nI) * up_nI

    found = _same_activation(whole, weight.device, gated=gated)
    object.__setattr__(owner, _FOUND, (found,))
    return found


def _same_activation(
    between: Callable[[Tensor], Tensor], device: torch.device, *, gated: bool, interleaved: bool = False
) -> str | None:
    """The activation of ours that gives the function's numbers on wide random inputs; None = none."""
    width = 2 * _PROBE_WIDTH if gated else _PROBE_WIDTH
    drawn = torch.randn(_PROBE_ROWS, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z_nF = torch.cat([drawn * std for std in _PROBE_STDS]).to(device)

    def ask(z_nF: Tensor) -> Tensor:  # z as ours, [gate; up]
        return between(torch.stack(z_nF.chunk(2, dim=1), dim=2).flatten(1) if interleaved else z_nF)

    with torch.no_grad(), torch.autocast(z_nF.device.type, enabled=False):
        try:
            found = ask(z_nF)
            limited = _limited(ask, z_nF) if gated else ()
        except (RuntimeError, TypeError, AttributeError):  # it wants another width or dtype than it was given
            return None
        plain = (name for name, ours in ACTIVATIONS.items() if ours.gated == gated)
        return next((name for name in (*plain, *limited) if _close(found, reference.activate(z_nF, name))), None)


def _limited(ask: Callable[[Tensor], Tensor], like: Tensor) -> list[str]:
    """Name the forms that clamp, each with the limit that the function has if it is of that form.

    At a small gate what comes out grows with up as far as the limit, and from 0 to 1 as much as in our form.
    """
    gate_nI, up_nI = torch.full_like(like[:1], 1 / 64).chunk(2, dim=1)

    def growth(function: Callable[[Tensor], Tensor], up: float) -> float:
        low, high = (torch.cat([gate_nI, torch.full_like(up_nI, value)], dim=1) for value in (0.0, up))
        return float((function(high) - function(low))[0, 0])

    names = []
    for name, default in DEFAULT_LIMITS.items():
        limit = growth(ask, _FAR) / growth(partial(reference.activate, activation=name), 1.0)
        if math.isclose(limit, default, rel_tol=_PROBE_TOLERANCE) or not 0 < limit < 0.9 * _FAR:
            continue  # as the plain name has it, or none at all
        names.append(f"{name}:{limit:.7g}")  # 7 digits: a module in float32 answers 7.00000018
    return names


def _close(found: Tensor, ours: Tensor) -> bool:
    if found.shape != ours.shape:
        return False
    size_n = ours.abs().amax(dim=1, keepdim=True).clamp(min=1.0)
    return bool(((found - ours).abs() <= _PROBE_TOLERANCE * size_n).all())
