"""CUDA graphs in Triton's interpreter: `recorded.py` of tests/support/bench, and the launches of kernels with it.

`graphs_on_the_cpu` puts this into torch.cuda, so that torch's own `make_graphed_callables` runs as it stands.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from recorded import Graph, recorded
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime.interpreter import GridExecutor


@contextmanager
def _with_launches(graph: Graph, **_: Any) -> Iterator[None]:
    run = GridExecutor.__call__

    def noted(launch: GridExecutor, *args: Any, **options: Any) -> None:
        with _disable_current_modes():  # how the interpreter moves memory is not part of a step
            run(launch, *args, **options)
        graph.work.append(lambda: run(launch, *args, **options))

    with mock.patch.object(GridExecutor, "__call__", noted), recorded(graph):
        yield


@contextmanager
def graphs_on_the_cpu() -> Iterator[None]:
    """Let torch.cuda make and replay graphs of steps of the CPU."""
    played: dict[str, Any] = {
        "CUDAGraph": Graph,
        "graph": _with_launches,
        "synchronize": lambda: None,
        "Stream": lambda: None,
        "stream": lambda _: nullcontext(),
    }
    with mock.patch.multiple(torch.cuda, **played), mock.patch.object(torch.cuda.graphs, "graph_pool_handle", object):
        yield
