"""Optimizers across a change of experts: new Parameters take the old ones' places, with the state of what stays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedmoe_core.layer.moe import MoE


@contextmanager
def following(optimizer: torch.optim.Optimizer, layers: nn.Module | Sequence[MoE]) -> Iterator[None]:
    """Let an optimizer go on with what ``layers`` train after their experts have changed within the block.

    Where other experts train than before, a layer's Parameters are new objects, and an optimizer would go on with the
    old ones without a word. Here each takes its predecessor's place in the group. The state of its experts that trained
    before comes along; that of the others is zero, with the step count of the Parameter.

    Args:
        optimizer: one of torch's, or of the same form: ``param_groups`` and ``state``.
        layers: MoE layers, or a module: all that are in it.

    Example:
        >>> import torch
        >>> layer = MoE(8, 16, 4, 2, trainable=[True, True, False, False])
        >>> optimizer = torch.optim.AdamW(layer.parameters())
        >>> with following(optimizer, layer):
        ...     layer.set_experts(None, [False, True, True, False])
        >>> any(parameter is layer.w_in for parameter in optimizer.param_groups[0]["params"])
        True
    """
    found = [m for m in layers.modules() if isinstance(m, MoE)] if isinstance(layers, nn.Module) else layers
    before = [(layer, _own(layer), layer.trainable_experts) for layer in found]
    yield
    for layer, old, experts in before:
        for name in {**old, **_own(layer)}:
            was, now = old.get(name), _own(layer).get(name)
            if was is not now:
                _replace(optimizer, was, now, beside=tuple(old.values()))
                state = {} if was is None else optimizer.state.pop(was, {})
                if was is not None and now is not None and state:
                    rows = _Rows(was, now, experts, layer.trainable_experts)
                    optimizer.state[now] = {key: rows.of(value) for key, value in state.items()}


def _own(layer: MoE) -> dict[str, nn.Parameter]:
    return dict(layer.named_parameters(recurse=False))


def _replace(
    optimizer: torch.optim.Optimizer, was: Tensor | None, now: Tensor | None, *, beside: tuple[Tensor, ...]
) -> None:
    """Put ``now`` where ``was`` is; one that is new goes to the group of the layer's others, or to the first."""
    groups: list[list[Tensor]] = [group["params"] for group in optimizer.param_groups]
    for params in groups:
        for place, parameter in enumerate(params):
            if parameter is was:
                params[place : place + 1] = [] if now is None else [now]
                return
    if was is None and now is not None:
        home = (params for params in groups if any(p is other for p in params for other in beside))
        next(home, groups[0]).append(now)


class _Rows:
    """Which rows of a Parameter's state go where."""

    def __init__(self, was: Tensor, now: Tensor, old: tuple[int, ...], new: tuple[int, ...]) -> None:
        self.was, self.now = was, now
        self.moves = [(place, old.index(e)) for place, e in enumerate(new) if e in old]

    def of(self, value: Any) -> Any:
        """The state's value for the new Parameter: rows for rows, anything else as it is."""
        if not isinstance(value, Tensor) or value.shape != self.was.shape or self.was.dim() == 0:
            return value
        moved = value.new_zeros(self.now.shape)
        for place, source in self.moves:
            moved[place] = value[source]
        return moved
