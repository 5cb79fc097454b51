"""The experts' activations and their derivatives, on tiles of rows, with every pass writing into a given buffer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """One activation h = f(z); shapes: n rows, I intermediate, F = 2 * I when `gated` (z = [gate; up]) and I otherwise.

    Attributes:
        gated: whether z holds gate and up.
        forward: (z_nF, out_nI) -> None, writes f(z).
        backward: (z_nF, d_nI, dz_nF) -> None, writes f'(z) applied to d, in which `dz_nF` arrives holding whatever
            `prepare` left there; `d_nI` is used up.
        prepare: (z_nF, out_nI, dz_nF) -> None, writes f(z) and may leave what `backward` can use in `dz_nF`'s second
            half (gated forms); the first half is the caller's scratch between the two calls.
    """

    gated: bool
    forward: Callable[[Tensor, Tensor], None]
    prepare: Callable[[Tensor, Tensor, Tensor], None]
    backward: Callable[[Tensor, Tensor, Tensor], None]

    def width(self, intermediate: int) -> int:
        """Return F, the rows of w_in per expert."""
        return 2 * intermediate if self.gated else intermediate


_Value = Callable[[Tensor, Tensor], object]  # (z, out): out = f(z)
_Slope = Callable[[Tensor, Tensor, Tensor], object]  # (d, z, out): out = d * f'(z); out may be d


def _plain(value: _Value, slope: _Slope) -> Activation:
    def forward(z_nI: Tensor, out_nI: Tensor) -> None:
        value(z_nI, out_nI)

    def prepare(z_nI: Tensor, out_nI: Tensor, _: Tensor) -> None:
        value(z_nI, out_nI)

    def backward(z_nI: Tensor, d_nI: Tensor, dz_nI: Tensor) -> None:
        slope(d_nI, z_nI, dz_nI)

    return Activation(False, forward, prepare, backward)


def _gated(value: _Value, slope: _Slope) -> Activation:
    def forward(z_nF: Tensor, out_nI: Tensor) -> None:
        gate_nI, up_nI = z_nF.chunk(2, dim=1)
        value(gate_nI, out_nI)
        out_nI.mul_(up_nI)

    def prepare(z_nF: Tensor, out_nI: Tensor, dz_nF: Tensor) -> None:
        gate_nI, up_nI = z_nF.chunk(2, dim=1)
        opened_nI = dz_nF.chunk(2, dim=1)[1]
        value(gate_nI, opened_nI)
        torch.mul(opened_nI, up_nI, out=out_nI)

    def backward(z_nF: Tensor, d_nI: Tensor, dz_nF: Tensor) -> None:
        gate_nI, up_nI = z_nF.chunk(2, dim=1)
        dgate_nI, dup_nI = dz_nF.chunk(2, dim=1)  # dup holds f(gate)
        dup_nI.mul_(d_nI)
        d_nI.mul_(up_nI)
        slope(d_nI, gate_nI, dgate_nI)

    return Activation(True, forward, prepare, backward)


@dataclass(frozen=True)
class _Clamped:
    """(up' + lift) * gate' * sigmoid(sharpness * gate'), where gate' <= limit and -limit <= up' <= limit."""

    sharpness: float
    lift: float


_CLAMPED: Mapping[str, _Clamped] = {"swiglu_oai": _Clamped(1.702, 1.0), "swiglu_clamped": _Clamped(1.0, 0.0)}
# Of the models that brought these forms, gpt-oss and DeepSeek-V4. A name may say another: "swiglu_clamped:12".
DEFAULT_LIMITS: Mapping[str, float] = {"swiglu_oai": 7.0, "swiglu_clamped": 10.0}


def _clamped(form: _Clamped, limit: float) -> Activation:
    sharpness, lift = form.sharpness, form.lift

    def forward(z_nF: Tensor, out_nI: Tensor) -> None:
        gate_nI, up_nI = z_nF.chunk(2, dim=1)
        gate_nI = gate_nI.clamp(max=limit)
        torch.mul(gate_nI, sharpness, out=out_nI)
        out_nI.sigmoid_().mul_(gate_nI).mul_(up_nI.clamp(-limit, limit).add_(lift))

    def prepare(z_nF: Tensor, out_nI: Tensor, _: Tensor) -> None:
        forward(z_nF, out_nI)

    def backward(z_nF: Tensor, d_nI: Tensor, dz_nF: Tensor) -> None:
        gate_nI, up_nI = z_nF.chunk(2, dim=1)
        dgate_nI, dup_nI = dz_nF.chunk(2, dim=1)
        clamped_nI = gate_nI.clamp(max=limit)
        open_nI = (clamped_nI * sharpness).sigmoid_()
        torch.mul(d_nI, clamped_nI, out=dup_nI)
        dup_nI.mul_(open_nI).masked_fill_(up_nI.abs() > limit, 0)
        d_nI.mul_(up_nI.clamp(-limit, limit).add_(lift)).masked_fill_(gate_nI > limit, 0)
        # d/dg g*sigmoid(c*g) = o + c*g*o*(1 - o), o = sigmoid(c*g)
        clamped_nI.mul_(sharpness).mul_(1 - open_nI).add_(1).mul_(open_nI)
        torch.mul(d_nI, clamped_nI, out=dgate_nI)

    return Activation(True, forward, prepare, backward)


def _silu(z: Tensor, out: Tensor) -> None:
    _aten.silu.out(z, out=out)


def _silu_slope(d: Tensor, z: Tensor, out: Tensor) -> None:
    _aten.silu_backward.grad_input(d, z, grad_input=out)


def _gelu(z: Tensor, out: Tensor) -> None:
    _aten.gelu.out(z, approximate="none", out=out)


def _gelu_slope(d: Tensor, z: Tensor, out: Tensor) -> None:
    _aten.gelu_backward.grad_input(d, z, approximate="none", grad_input=out)


def _gelu_tanh(z: Tensor, out: Tensor) -> None:
    _aten.gelu.out(z, approximate="tanh", out=out)


def _gelu_tanh_slope(d: Tensor, z: Tensor, out: Tensor) -> None:
    _aten.gelu_backward.grad_input(d, z, approximate="tanh", grad_input=out)


def _relu(z: Tensor, out: Tensor) -> None:
    torch.clamp(z, min=0, out=out)


def _relu_slope(d: Tensor, z: Tensor, out: Tensor) -> None:
    _aten.threshold_backward.grad_input(d, z, 0, grad_input=out)


def _relu2(z: Tensor, out: Tensor) -> None:
    torch.clamp(z, min=0, out=out)
    out.mul_(out)


def _relu2_slope(d: Tensor, z: Tensor, out: Tensor) -> None:
    torch.mul(d, z.clamp(min=0), out=out)
    out.mul_(2)


# A plain dict that its type makes read-only: torch.compile refuses a graph that reads a MappingProxyType after it has
# changed some other dict, as transformers' generation does.
ACTIVATIONS: Mapping[str, Activation] = {
    "swiglu": _gated(_silu, _silu_slope),
    "geglu": _gated(_gelu, _gelu_slope),
    "geglu_tanh": _gated(_gelu_tanh, _gelu_tanh_slope),
    **{name: _clamped(form, DEFAULT_LIMITS[name]) for name, form in _CLAMPED.items()},
    "relu": _plain(_relu, _relu_slope),
    "relu2": _plain(_relu2, _relu2_slope),
    "gelu": _plain(_gelu, _gelu_slope),
    "gelu_tanh": _plain(_gelu_tanh, _gelu_tanh_slope),
    "silu": _plain(_silu, _silu_slope),
}


def parts(activation: str) -> tuple[str, float]:
    """Split an activation's name into that of ``ACTIVATIONS`` and its limit, 0.0 for one that does not clamp.

    Raises:
        ValueError: an unknown name, a limit where there is none to set, or one that is not a positive number.

    Example:
        >>> parts("swiglu_oai"), parts("swiglu_clamped:12"), parts("geglu")
        (('swiglu_oai', 7.0), ('swiglu_clamped', 12.0), ('geglu', 0.0))
    """
    name, colon, given = activation.partition(":")
    if name not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; choose one of {', '.join(ACTIVATIONS)}")
    if not colon:
        return name, DEFAULT_LIMITS.get(name, 0.0)
    if name not in DEFAULT_LIMITS:
        raise ValueError(f"activation is {activation!r}; {name} has no limit, only {', '.join(DEFAULT_LIMITS)} have")
    try:
        limit = float(given)
    except ValueError:
        limit = math.nan
    if not 0 < limit < math.inf:
        raise ValueError(f"activation is {activation!r}; its limit must be a positive number, as in '{name}:10'")
    return name, limit


def is_gated(activation: str) -> bool:
    """Say whether z holds gate and up; the name may have a limit."""
    return ACTIVATIONS[parts(activation)[0]].gated


def width(activation: str, intermediate: int) -> int:
    """Return F, the rows of w_in per expert; the name may have a limit."""
    return ACTIVATIONS[parts(activation)[0]].width(intermediate)


def named(activation: str) -> Activation:
    """Return an activation by its name, with its limit: "swiglu_clamped:12" clamps at 12.

    Raises:
        ValueError: as ``parts``.
    """
    if activation in ACTIVATIONS:
        return ACTIVATIONS[activation]
    name, limit = parts(activation)
    return _clamped(_CLAMPED[name], limit)
