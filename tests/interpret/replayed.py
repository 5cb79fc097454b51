"""CUDA graphs played on a CPU: what a capture records is run again on the same memory, whatever that holds by then.

`graphs_on_the_cpu` puts this into torch.cuda, so that torch's own `make_graphed_callables` runs as it stands. Torch's
operations are recorded below autograd, launches of kernels as the interpreter gets them. A number that the host read
at the capture stays what it was then, as on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor

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
def _recorded(graph: Graph, **_: Any) -> Iterator[None]:
    run = GridExecutor.__call__

    def noted(launch: GridExecutor, *args: Any, **options: Any) -> None:
        with _disable_current_modes():  # how the interpreter moves memory is not part of a step
            run(launch, *args, **options)
        graph.work.append(lambda: run(launch, *args, **options))

    # The operators' bodies run as they do without a mode, or their operations would not be seen.
    with (
        mock.patch.object(GridExecutor, "__call__", noted),
        mock.patch.object(operator, "_watched", return_value=False),
        _Recorder(graph),
    ):
        yield


@contextmanager
def graphs_on_the_cpu() -> Iterator[None]:
    """Let torch.cuda make and replay graphs of steps of the CPU."""
    played: dict[str, Any] = {
        "CUDAGraph": Graph,
        "graph": _recorded,
        "synchronize": lambda: None,
        "Stream": lambda: None,
        "stream": lambda _: nullcontext(),
    }
    with mock.patch.multiple(torch.cuda, **played), mock.patch.object(torch.cuda.graphs, "graph_pool_handle", object):
        yield
