"""Stacked experts of a stock model as peft meets them: which parameters their two matrices are, and how they lie."""

from __future__ import annotations

from torch import Tensor, nn


def matrices_of(module: nn.Module) -> tuple[str, ...]:
    """Return the names of w_in and w_out of stacked experts; () for any other module."""
    for name in ("gate_up_proj", "up_proj"):
        both = [getattr(module, each, None) for each in (name, "down_proj")]
        if all(isinstance(each, Tensor) and each.dim() == 3 for each in both):
            return name, "down_proj"
    return ()


def matrix_shapes(experts: nn.Module) -> tuple[tuple[int, ...], ...]:
    """Return (E, F, H) and (E, H, I), also for experts that are stored transposed."""
    shapes = [tuple(getattr(experts, name).shape) for name in matrices_of(experts)]
    transposed = getattr(experts, "is_transposed", False)
    return tuple((count, last, first) if transposed else (count, first, last) for count, first, last in shapes)


def interleaved(experts: nn.Module, name: str) -> bool:
    """Tell whether a matrix has its rows of gate and up in turn, as gpt-oss does."""
    gated = name == "gate_up_proj" and getattr(experts, "has_gate", True)
    return gated and not getattr(experts, "is_concatenated", True)


def stacks_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """List the stacked experts of a stock model with their names, in depth order.

    Raises:
        ValueError: it has none.
    """
    found = [(name, module) for name, module in model.named_modules() if matrices_of(module)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no stacked experts; give a MoE model of transformers")
    return found
