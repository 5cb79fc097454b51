"""A CUDA graph played on a CPU: what is recorded runs again on the same memory, whatever that holds by then.

Torch's operations are recorded below autograd. A number that the host read meanwhile stays what it was, as on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedmoe_kernels import operator


class Graph:
    """What torch.cuda.CUDAGraph is to its callers."""

    def __init__(self) -> None:
        self.work: list[Callable[[], None]] = []

    def replay(self) -> None:
        with torch.no_grad():
            for do in self.work:
                do()


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        # What lies in an argument's memory is a view, or was changed there; the rest has to be written there again.
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        new = [t.untyped_storage().data_ptr() not in given for t in made]

        def again() -> None:
            found = [t for t in tree_leaves(func(*args, **(kwargs or {}))) if isinstance(t, Tensor)]
            for old, value, is_new in zip(made, found, new, strict=True):
                if is_new:
                    old.copy_(value)

        self.graph.work.append(again)
        return out


@contextmanager
def recorded(graph: Graph, **_: Any) -> Iterator[None]:
    """Record what runs within it, as torch.cuda.graph does; the operators' bodies run as they do without a mode."""
    with mock.patch.object(operator, "_watched", return_value=False), _Recorder(graph):
        yield
