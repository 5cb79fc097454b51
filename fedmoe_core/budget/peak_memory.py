"""Peak memory of a step: as the profiler sees torch's CPU allocator, or as the CUDA allocator counts it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch._C._profiler import RecordScope, _EventType, _ExtraFields_Allocation, _ProfilerEvent
from torch.autograd import ProfilerActivity, _disable_profiler, _enable_profiler, _prepare_profiler
from torch.autograd.profiler import profile, record_function

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
    """Run ``step`` once; return its result and the peak of what torch allocated meanwhile.

    On the CPU, freeing a block that is older than the step lowers nothing, so the peak is then a bound from above.
    Torch's profiler caches block sizes across traces and may subtract a stale size for a reused address; live blocks
    are therefore tracked by address here. On CUDA only the overall peak is known, so ``phases`` is {"start": peak}.

    Raises:
        RuntimeError: a profiler runs already in this thread.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        base = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = step()
        peak = torch.cuda.max_memory_allocated(device) - base
        return result, MemoryTrace(peak, {"start": peak})
    result, events = _recorded(step)
    level, phase, phases = 0, "start", {"start": 0}
    blocks: dict[int, int] = {}  # address -> bytes of what the step has allocated and not freed
    for event in _in_time(events):
        fields = event.extra_fields
        if isinstance(fields, _ExtraFields_Allocation):
            if fields.alloc_size > 0:
                blocks[fields.ptr] = fields.alloc_size
                level += fields.alloc_size
            else:
                level -= blocks.pop(fields.ptr, 0)
        else:
            phase = event.name.removeprefix(_MARK)
        phases[phase] = max(phases.get(phase, level), level)
    return result, MemoryTrace(max(phases.values()), phases)


def _recorded(step: Callable[[], T]) -> tuple[T, list[_ProfilerEvent]]:
    """Run ``step``; its result, and its allocations and marks as the roots of trees.

    ``torch.profiler.profile`` would also record every operator: 75 ms more for a step of the demo, which takes 45 ms
    itself, against 10 ms here. And it lies in a reference cycle, with 0.3 to 2.9 MiB of events that only the garbage
    collector frees.
    """
    # The profiler's tracing library logs two lines to stderr for every profile unless told to be quiet.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    config, activities = profile(profile_memory=True).config(create_trace_id=True), {ProfilerActivity.CPU}
    _prepare_profiler(config, activities)
    # Of functions only those that ``mark`` makes; the stub knows no scopes.
    _enable_profiler(config, activities, {RecordScope.USER_SCOPE})  # type: ignore[call-arg]
    try:
        result = step()
    finally:
        recorded = _disable_profiler()
    return result, recorded.experimental_event_tree()


def _in_time(roots: list[_ProfilerEvent]) -> list[_ProfilerEvent]:
    """All allocations and marks below ``roots``, of all threads, as they came."""
    found, waiting = [], list(roots)
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag == _EventType.Allocation or event.name.startswith(_MARK):
            found.append(event)
    return sorted(found, key=lambda event: event.start_time_ns)


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Count the bytes of the distinct storages behind ``tensors``; views and tied weights count once."""
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
    """Count the bytes held between two steps: parameters, buffers, gradients and optimizer state."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    if optimizer is not None:
        tensors += [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    return tensor_bytes(tensors)
