"""What torch's FLOP counter counts for the operators, from their shapes alone, so that counting reads no device.

A product of m x k and k x n counts 2 * m * n * k, as the counter has it. Shapes say less than values, and then the most
that can be: every place is a row, though padding and absent experts have none. Rows are taken to be spread evenly over
the slots, of which those that train or have adapters have their share.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from fedmoe_kernels.experts.op_inputs import DIFFERENTIABLE, OpInputs


def forward_flops(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Count a call of `fedmoe::moe_mlp` from its arguments, shapes for tensors: both products of every row."""
    shapes: Any = OpInputs(*args[: len(OpInputs._fields)])
    return 2 * (_rows(shapes) * sum(_products(shapes)) + _adapted(shapes))


def backward_flops(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Count a call of `fedmoe::moe_mlp_backward`: what its `needs` ask for, and z again where it was not kept."""
    z_RF, needs = args[1], args[-3]
    shapes: Any = OpInputs(*args[2 : 2 + len(OpInputs._fields)])
    rows, (first, second) = _rows(shapes), _products(shapes)
    need = dict(zip(DIFFERENTIABLE, needs, strict=False))
    learning = rows * shapes.w_in[0] // _slots(shapes)
    flops = rows * second  # the gradient of every activation, from which the routing weights' gradient comes, too
    flops += rows * first * (need["x_TH"] + (z_RF[0] == 0))
    flops += learning * (first * need["w_in"] + second * need["w_out"])
    return 2 * (flops + _adapted(shapes) * (1 + need["a_in"]))


def _rows(shapes: Any) -> int:
    return math.prod(shapes.rows_TK)


def _slots(shapes: Any) -> int:
    return int(shapes.offsets_B1[0]) - 1


def _products(shapes: Any) -> tuple[int, int]:
    """Multiplications of a row in the first product and in the second."""
    return math.prod(shapes.w_in[1:]), math.prod(shapes.w_out[1:])


def _adapted(shapes: Any) -> int:
    """Multiplications of the adapters, all their rows."""
    factors = [f for f in (shapes.a_in, shapes.b_in, shapes.a_out, shapes.b_out) if f is not None]
    if not factors:
        return 0
    return _rows(shapes) * factors[0][0] // _slots(shapes) * sum(math.prod(f[1:]) for f in factors)


_FORMULAS = (("moe_mlp", forward_flops), ("moe_mlp_backward", backward_flops))


def tell_counters() -> None:
    """Give torch's FLOP counter the formulas, those counters too that run already; nothing where it is not loaded.

    Importing it would import triton, which must not be needed to import this package.
    """
    counting = sys.modules.get("torch.utils.flop_counter")
    if counting is None:
        return
    running = [mode.counter.flop_registry for mode in _get_current_dispatch_mode_stack() if hasattr(mode, "counter")]
    for name, formula in _FORMULAS:
        packet = getattr(torch.ops.fedmoe, name)
        if packet not in counting.flop_registry:
            counting.register_flop_formula(packet)(formula)
        for registry in running:  # a counter copies the formulas when it is made
            registry.setdefault(packet, counting.flop_registry[packet])
