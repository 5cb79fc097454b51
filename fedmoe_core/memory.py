"""Peak memory of a step: as the profiler sees torch's CPU allocator, or as the CUDA allocator counts it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

T = TypeVar("T")
_MARK = "fedmoe.phase:"


@dataclass(frozen=True)
class MemoryTrace:
    """Bytes above what was allocated when the step began.

    Attributes:
        peak: highest level during the step.
        phases: the same for each stretch between two marks; the first stretch, before any mark, is "start".
    """

    peak: int
    phases: dict[str, int]


def mark(name: str, device: torch.device) -> None:
    """Begin a new phase of the step being traced; costs microseconds and does nothing outside ``trace_memory``."""
    if device.type == "cpu":
        with record_function(_MARK + name):
            pass


def trace_memory(step: Callable[[], T], device: torch.device) -> tuple[T, MemoryTrace]:
    """Run ``step`` once; its result, and the peak of what torch allocated meanwhile.

    On the CPU, freeing a block that is older than the step lowers nothing: the profiler does not know its size, so the
    peak is then a bound from above. On CUDA only the overall peak is known, so ``phases`` is {"start": peak}.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        base = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = step()
        peak = torch.cuda.max_memory_allocated(device) - base
        return result, MemoryTrace(peak, {"start": peak})
    # The profiler's tracing library logs two lines to stderr for every profile unless told to be quiet.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = step()
    assert recorded.profiler is not None
    assert recorded.profiler.kineto_results is not None
    events = [
        (event.start_ns(), event.name(), event.nbytes())
        for event in recorded.profiler.kineto_results.events()
        if event.name() == "[memory]" or event.name().startswith(_MARK)
    ]
    events.sort(key=lambda event: event[0])
    level, phase, phases = 0, "start", {"start": 0}
    for _, name, nbytes in events:
        if name == "[memory]":
            level += nbytes
        else:
            phase = name.removeprefix(_MARK)
        phases[phase] = max(phases.get(phase, level), level)
    return result, MemoryTrace(max(phases.values()), phases)


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind ``tensors``; views and tied weights count once."""
    storages = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr(), storage.device] = storage.nbytes()
    return sum(storages.values())


class HasState(Protocol):
    """An optimizer, as far as its memory goes."""

    @property
    def state(self) -> Any: ...


def resident_bytes(model: nn.Module, optimizer: HasState | None = None) -> int:
    """Bytes held between two steps: parameters, buffers, gradients and optimizer state."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    if optimizer is not None:
        tensors += [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    return tensor_bytes(tensors)
