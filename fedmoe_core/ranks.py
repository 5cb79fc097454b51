"""Many processes, one round: which rank trains which client, and reports gathered as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Ranks:
    """This process among ``world`` processes that hold the same state and make the same plans."""

    rank: int = 0
    world: int = 1
    device: torch.device = CPU

    @property
    def leads(self) -> bool:
        """Whether this process writes files and speaks to the user."""
        return self.rank == 0

    def mine(self, items: Sequence[T], costs: Sequence[float]) -> list[T]:
        """Return this rank's share: longest first onto the least loaded rank, ties by index; the same on every rank."""
        loads = [0.0] * self.world
        share = []
        for index in sorted(range(len(items)), key=lambda i: (-costs[i], i)):
            target = min(range(self.world), key=lambda rank: (loads[rank], rank))
            loads[target] += costs[index]
            if target == self.rank:
                share.append(index)
        return [items[index] for index in sorted(share)]

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's JSON value, in rank order. JSON, not pickle: nothing read here can run code."""
        if self.world == 1:
            return [json.loads(json.dumps(value))]
        mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self.device)
        sizes = torch.zeros(self.world, dtype=torch.int64, device=self.device)
        sizes[self.rank] = mine.numel()
        dist.all_reduce(sizes)
        padded = torch.zeros(int(sizes.max()), dtype=torch.uint8, device=self.device)
        padded[: mine.numel()] = mine
        parts = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(parts, padded)
        return [
            json.loads(bytes(part[:size].cpu().tolist()).decode())
            for part, size in zip(parts, sizes.tolist(), strict=True)
        ]

    def wait(self) -> None:
        """Return once every rank is here."""
        if self.world > 1:
            dist.barrier()


@contextmanager
def open_ranks(ranks: int, device: torch.device) -> Iterator[Ranks]:
    """Join the processes that torchrun started (gloo on CPU, NCCL on CUDA), and leave them at the end.

    Raises:
        ValueError: ``ranks`` is not the number of processes started.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != ranks:
        raise ValueError(
            f"ranks={ranks} but {world} process(es) run; start it with torchrun --nproc-per-node={ranks}, or set ranks"
        )
    if world == 1:
        yield Ranks(device=device)
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=30))
    try:
        yield Ranks(dist.get_rank(), world, device)
    finally:
        dist.destroy_process_group()
