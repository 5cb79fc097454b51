"""Time marks and memory readings: CUDA events and the caching allocator on a GPU, perf_counter and nothing on a CPU."""

from __future__ import annotations

import time
from typing import Any

import torch

LEAD_MILLISECONDS = 2.0


class Clock:
    """Marks time on one device; on a GPU the marks lie in the stream, so reading them waits for it.

    `start` idles the device, empties its L2 cache by writing four times its size, and then has it spin for two
    milliseconds. As the device does that, the host queues what comes next. So what lies between two marks is the
    device's time as long as the host needs less than that to queue it (a forward and backward of one layer take 1.2 to
    1.5 ms of a host); how long the host needs is measured beside it.

    Args:
        device: "cuda" or "cpu".
    """

    def __init__(self, device: str) -> None:
        self.gpu = device == "cuda"
        self._cold, self._spin = None, 0
        if self.gpu:
            properties = torch.cuda.get_device_properties(torch.cuda.current_device())
            self._cold = torch.empty(4 * properties.L2_cache_size, dtype=torch.int8, device=device)
            # kHz times milliseconds are the cycles of the SM's clock; not every torch says the clock.
            self._spin = int(LEAD_MILLISECONDS * max(getattr(properties, "clock_rate", 0), 1_900_000))

    def start(self) -> None:
        if self._cold is not None:
            torch.cuda.synchronize()
            self._cold.zero_()
            torch.cuda._sleep(self._spin)

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
