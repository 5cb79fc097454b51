"""A CUDA device that is the CPU, for the branches of the GPU script that no CPU reaches; nothing it times is a time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from recorded import Graph, recorded
from torch.overrides import TorchFunctionMode

NAME = "NVIDIA H100 80GB HBM3"


class _OnTheCpu(TorchFunctionMode):
    """Every tensor asked for on "cuda" is made on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        moved = [_moved(arg) for arg in args]
        return func(*moved, **{name: _moved(value) for name, value in (kwargs or {}).items()})


def _moved(value: Any) -> Any:
    if isinstance(value, str) and value == "cuda":
        return "cpu"
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == "cuda" else value


class _Event:
    def __init__(self, **_: Any) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: _Event) -> float:
        return 1e3 * (later.at - self.at)


class _Stream:
    """A class, as the real one is, for modules that write `torch.cuda.Stream | None`."""

    cuda_stream = 0

    def wait_stream(self, other: _Stream) -> None:
        pass


@contextmanager
def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within it the script sees one H100, of which memory readings are 1 and 3 MB."""
    properties = SimpleNamespace(L2_cache_size=2**16, uuid="0", name=NAME)
    stream = _Stream()
    pretended = {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "get_device_name": lambda *_: NAME,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: properties,
        "synchronize": lambda: None,
        "_sleep": lambda cycles: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 10**6,
        "max_memory_allocated": lambda: 4 * 10**6,
        "Event": _Event,
        "CUDAGraph": Graph,
        "graph": recorded,
        "Stream": _Stream,
        "current_stream": lambda: stream,
        "stream": lambda stream: nullcontext(),
    }
    generator = torch.Generator

    class Generator:
        """A class, as the real one is: modules that are imported meanwhile write `torch.Generator | None`."""

        def __new__(cls, device: Any = "cpu") -> Any:
            return generator(_moved(device))

    with monkeypatch.context() as patch:
        for name, value in pretended.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch, "Generator", Generator)
        patch.setattr(torch.cuda.graphs, "graph_pool_handle", object)
        with _OnTheCpu():
            yield
