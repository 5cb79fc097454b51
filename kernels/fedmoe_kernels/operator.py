"""The short way to an operator: past torch's dispatcher where nothing but autograd would see the call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType
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
        transformed: the same under torch.func.grad, see `transformed_of`; None = it has no use there.
        announce: called before the operator is, where something may watch it; None = nothing to say.
    """

    op: Callable[..., Any]
    body: Callable[..., Any]
    differentiable: Callable[..., Any] | None = None
    transformed: Callable[..., Any] | None = None
    announce: Callable[[], None] | None = None

    def __call__(self, *args: Any) -> Any:
        """Call it, whichever way."""
        if _watched():
            transform = _transform()
            if transform == TransformType.Jvp and any(isinstance(a, Tensor) and a.is_floating_point() for a in args):
                raise RuntimeError(
                    "routing and experts have no forward-mode derivative, and torch would take it for zero; use "
                    "torch.func.grad, vjp or jacrev"
                )
            if self.transformed is not None and transform == TransformType.Grad:
                return self.transformed(self, *args)
            if self.announce is not None and not torch.compiler.is_compiling():
                self.announce()
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


def _transform() -> Any:
    """The innermost transform of torch.func, None where there is none; a compiled one is the compiler's affair."""
    inner = None if torch.compiler.is_compiling() else torch._C._functorch.peek_interpreter_stack()
    return None if inner is None else inner.key()


def transformed_of(name: str, setup: Callable[..., None], backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make what an operator is under torch.func.grad, which the derivative of a custom operator does not serve.

    Args:
        name, setup, backward: as `function_of`.
    """

    def derive(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *backward(ctx, ctx.needs_input_grad[1:], *gradients)

    return _transformed(name, lambda ctx, inputs, output: setup(ctx, inputs[1:], output), derive)


def last_derivative(name: str) -> Callable[..., Any]:
    """Make what the backward of an operator is under torch.func.grad: what raises where it is differentiated itself."""

    def refuse(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        raise RuntimeError(f"{name} is differentiable once; take a second derivative by finite differences")

    return _transformed(f"{name}_backward", lambda ctx, inputs, output: None, refuse)


def _transformed(name: str, setup: Callable[..., None], backward: Callable[..., Any]) -> Callable[..., Any]:
    """The operator's own call, one transform further out."""
    parts = {
        "forward": staticmethod(lambda operator, *args: operator(*args)),
        "setup_context": staticmethod(setup),
        "backward": staticmethod(backward),
    }
    function: Any = type(name, (torch.autograd.Function,), parts)
    return lambda *args: function.apply(*args)


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
