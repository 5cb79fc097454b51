"""The short way to an operator: past torch's dispatcher where nothing but autograd would see the call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

_PLAIN = (Tensor, Parameter)


@dataclass(frozen=True, eq=False)
class Operator:
    """A custom operator of torch, and its body for calls that need no dispatcher.

    An operator's call costs 37 us with one argument and 315 with 28, an `autograd.Function` of 28 costs 21 (on the
    host, bench/results/host-triton-3.7.1.md). So eager calls take the body, under autograd in such a function; the
    operator serves whatever must see it: compilation and export, tensors without memory or of other classes, modes
    that watch the dispatcher, function transforms, and the profiler, which then shows its name.

    Attributes:
        op: the operator.
        body: what it does, from the same arguments.
        differentiable: the same under autograd, see `function_of`; None = the operator has no derivative.
    """

    op: Callable[..., Any]
    body: Callable[..., Any]
    differentiable: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        """Call it, whichever way."""
        if _watched():
            return self.op(*args)
        graded = False
        for value in args:
            if isinstance(value, Tensor):
                # An ordinary tensor with memory, on a device that the bodies serve?
                if type(value) not in _PLAIN or not (value.is_cuda or value.is_cpu):
                    return self.op(*args)
                graded = graded or value.requires_grad
        if graded and torch.is_grad_enabled():
            return self.op(*args) if self.differentiable is None else self.differentiable(*args)
        return self.body(*args)


def _watched() -> bool:
    """Whether something besides autograd would see an operator's call."""
    return (
        torch.compiler.is_compiling()
        or is_in_torch_dispatch_mode()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd._profiler_enabled()
        or torch.jit.is_tracing()
    )


def function_of(
    name: str, forward: Callable[..., Any], setup: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """Make an `autograd.Function` of an operator, differentiable once, and return what calls it.

    The call takes the operator's arguments. Autograd sees only those that require a gradient, and the rest in one
    tuple, which saves 12 us of 26.

    Args:
        name: shown in graphs of gradients.
        forward: the operator's body.
        setup: (ctx, inputs, output), as the operator's `setup_context`.
        backward: (ctx, needs, *gradients) -> a gradient or None for each argument; `needs` are as many booleans.
    """

    def run(ctx: Any, args: tuple[Any, ...], places: list[int], *_: Tensor) -> Any:
        output = forward(*args)
        setup(ctx, args, output)
        ctx.places, ctx.needs = places, [place in places for place in range(len(args))]
        return output

    def send_back(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        found = backward(ctx, ctx.needs, *gradients)
        return None, None, *(found[place] for place in ctx.places)

    once = torch.autograd.function.once_differentiable(send_back)
    function: Any = type(
        name, (torch.autograd.Function,), {"forward": staticmethod(run), "backward": staticmethod(once)}
    )

    def call(*args: Any) -> Any:
        places = [place for place, value in enumerate(args) if isinstance(value, Tensor) and value.requires_grad]
        return function.apply(args, places, *[args[place] for place in places])

    return call
