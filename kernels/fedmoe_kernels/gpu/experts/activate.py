"""The activations and their derivatives inside a kernel, in float32; formulas as `reference.activate`."""

import triton
import triton.language as tl

SHARPNESS = tl.constexpr(1.702)  # of the gate's sigmoid in gpt-oss
INV_SQRT2 = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
TWICE_SQRT_2_BY_PI = tl.constexpr(1.5957691216057308)  # (1 + tanh u) / 2 is sigmoid(2u)
CUBIC = tl.constexpr(0.044715)


@triton.jit
def _value(z, ACTIVATION: tl.constexpr):
    """f(z) and f'(z) of the ungated form."""
    if ACTIVATION == "silu":
        open_ = tl.sigmoid(z)
        return z * open_, open_ * (1.0 + z * (1.0 - open_))
    elif ACTIVATION == "gelu":
        below = 0.5 * (1.0 + tl.erf(z * INV_SQRT2))
        return z * below, below + z * tl.exp(-0.5 * z * z) * INV_SQRT_2PI
    elif ACTIVATION == "gelu_tanh":
        square = z * z * CUBIC
        below = tl.sigmoid(z * TWICE_SQRT_2_BY_PI * (1.0 + square))
        return z * below, below + z * TWICE_SQRT_2_BY_PI * (1.0 + square * 3.0) * below * (1.0 - below)
    elif ACTIVATION == "relu2":
        above = tl.maximum(z, 0.0)
        return above * above, 2.0 * above
    else:
        tl.static_assert(ACTIVATION == "relu")
        return tl.maximum(z, 0.0), tl.where(z > 0.0, 1.0, 0.0)


@triton.jit
def _clamped(gate, up, LIMIT: tl.constexpr, SHARP: tl.constexpr, LIFT: tl.constexpr):
    """gate', up' + LIFT and sigmoid(SHARP * gate'), gate' and up' being clamped."""
    low = tl.minimum(gate, LIMIT)
    return low, tl.minimum(tl.maximum(up, -LIMIT), LIMIT) + LIFT, tl.sigmoid(low * SHARP)


@triton.jit
def _clamped_slopes(gate, up, d, LIMIT: tl.constexpr, SHARP: tl.constexpr, LIFT: tl.constexpr):
    low, lifted, open_ = _clamped(gate, up, LIMIT, SHARP, LIFT)
    slope = open_ * (1.0 + low * SHARP * (1.0 - open_))
    # As torch.clamp: the gradient passes at the limit itself and stops beyond it.
    dgate = tl.where(gate <= LIMIT, d * lifted * slope, 0.0)
    dup = tl.where(tl.abs(up) <= LIMIT, d * low * open_, 0.0)
    return lifted * low * open_, dgate, dup


@triton.jit
def activate(gate, up, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr):
    """Compute h of a block. Ungated forms read `gate` alone; pass it twice. LIMIT is of those that clamp."""
    if ACTIVATION == "swiglu":
        return gate * tl.sigmoid(gate) * up
    elif ACTIVATION == "geglu":
        return gate * 0.5 * (1.0 + tl.erf(gate * INV_SQRT2)) * up
    elif ACTIVATION == "geglu_tanh":
        return _value(gate, "gelu_tanh")[0] * up
    elif ACTIVATION == "swiglu_oai":
        low, lifted, open_ = _clamped(gate, up, LIMIT, SHARPNESS, 1.0)
        return lifted * low * open_
    elif ACTIVATION == "swiglu_clamped":
        low, lifted, open_ = _clamped(gate, up, LIMIT, 1.0, 0.0)
        return lifted * low * open_
    else:
        return _value(gate, ACTIVATION)[0]


@triton.jit
def slopes(gate, up, d, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr):
    """(h, dgate, dup): the activation and the gradient d of h sent back to its inputs; dup only means something when
    gated."""
    if ACTIVATION == "swiglu":
        value, slope = _value(gate, "silu")
        return value * up, d * up * slope, d * value
    elif ACTIVATION == "geglu":
        value, slope = _value(gate, "gelu")
        return value * up, d * up * slope, d * value
    elif ACTIVATION == "geglu_tanh":
        value, slope = _value(gate, "gelu_tanh")
        return value * up, d * up * slope, d * value
    elif ACTIVATION == "swiglu_oai":
        return _clamped_slopes(gate, up, d, LIMIT, SHARPNESS, 1.0)
    elif ACTIVATION == "swiglu_clamped":
        return _clamped_slopes(gate, up, d, LIMIT, 1.0, 0.0)
    else:
        value, slope = _value(gate, ACTIVATION)
        return value, d * slope, d
