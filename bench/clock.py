"""Time marks and memory readings: CUDA events and the caching allocator on a GPU, perf_counter and nothing on a CPU."""

from __future__ import annotations

import time
from typing import Any

import torch


class Clock:
    """Marks time on one device; on a GPU the marks lie in the stream, so reading them waits for it.

    `start` idles the device and empties its L2 cache by writing four times its size. As the device does that, the host
    queues what comes next: about 0.1 ms ahead on an H100, as `triton.testing.do_bench` has it. What a contender needs
    of the host beyond that, it is charged.

    Args:
        device: "cuda" or "cpu".
    """

    def __init__(self, device: str) -> None:
        self.gpu = device == "cuda"
        self._cold = None
        if self.gpu:
            size = 4 * torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
            self._cold = torch.empty(size, dtype=torch.int8, device=device)

    def start(self) -> None:
        if self._cold is not None:
            torch.cuda.synchronize()
            self._cold.zero_()

    def mark(self) -> Any:
        if not self.gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, first: Any, last: Any) -> float:
        if not self.gpu:
            return 1e3 * (last - first)
        last.synchronize()
        return float(first.elapsed_time(last))


class Memory:
    """Bytes of tensors above those that were there when it was made; None where torch keeps no count (CPU)."""

    def __init__(self, device: str) -> None:
        self.gpu = device == "cuda"
        if self.gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._base = torch.cuda.memory_allocated()

    def now(self) -> int | None:
        return torch.cuda.memory_allocated() - self._base if self.gpu else None

    def peak(self) -> int | None:
        return torch.cuda.max_memory_allocated() - self._base if self.gpu else None
