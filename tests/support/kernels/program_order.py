"""Runs the programs of a launch in another order; the interpreter's is always the same, and a GPU's is none."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import numpy as np

Patch = Callable[[Any, str, Any], None]  # of an object, the name of an attribute and its new value: monkeypatch.setattr
Order = Callable[[int], Any]  # number of programs -> in which order they run, each once
ORDERS = MappingProxyType(
    {
        "as numbered": np.arange,
        "reversed": lambda count: np.arange(count)[::-1],
        "shuffled": lambda count: np.random.default_rng(count).permutation(count),
    }
)


def install(patch: Patch, order: Order) -> None:
    """Let every launch from now on run its programs in `order`.

    The interpreter asks for programs (x, y, z) one by one, z fastest; each question gets another program of the launch.
    """
    from triton.runtime.interpreter import InterpreterBuilder

    set_grid_idx = InterpreterBuilder.set_grid_idx

    def another(self: Any, x: int, y: int, z: int) -> None:
        _, Y, Z = self.grid_dim
        if (x, y, z) == (0, 0, 0):
            self.order = order(int(np.prod(self.grid_dim)))
        program = int(self.order[(x * Y + y) * Z + z])
        set_grid_idx(self, program // (Y * Z), program // Z % Y, program % Z)

    patch(InterpreterBuilder, "set_grid_idx", another)
