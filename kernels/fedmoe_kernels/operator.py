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
        differentiable: an `autograd.Function` with the same arguments; None = the operator has no derivative.
    """

    op: Callable[..., Any]
    body: Callable[..., Any]
    differentiable: type[torch.autograd.Function] | None = None

    def __call__(self, *args: Any) -> Any:
        """Call it, whichever way."""
        tensors = [value for value in args if isinstance(value, Tensor)]
        if _watched() or not all(map(_is_plain, tensors)):
            return self.op(*args)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return self.op(*args) if self.differentiable is None else self.differentiable.apply(*args)
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


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is an ordinary one with memory, on a device that the bodies serve."""
    return type(tensor) in _PLAIN and tensor.device.type in ("cpu", "cuda")


def function_of(
    name: str, forward: Callable[..., Any], setup: Callable[..., None], backward: Callable[..., Any]
) -> type[torch.autograd.Function]:
    """Make the `autograd.Function` of an operator from what `register_autograd` takes, differentiable once.

    Args:
        name: shown in graphs of gradients.
        forward: the operator's body.
        setup: (ctx, inputs, output), as the operator's `setup_context`.
        backward: (ctx, *gradients), as the operator's.
    """

    def run(ctx: Any, *args: Any) -> Any:
        output = forward(*args)
        setup(ctx, args, output)
        return output

    once = torch.autograd.function.once_differentiable(backward)
    return type(name, (torch.autograd.Function,), {"forward": staticmethod(run), "backward": staticmethod(once)})
