"""Many processes, one round: which rank trains which client, and reports gathered as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from fedmoe_core.simulation import launch

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
        with self.meeting():
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
            with self.meeting():
                dist.barrier()

    @contextmanager
    def meeting(self, trouble: str = "lost the others") -> Iterator[None]:
        """Turn the error of a collective into one that says what it means: backends raise a bare RuntimeError.

        Raises:
            launch.PeerLostError: another rank ended, or did not come within 30 minutes.
        """
        try:
            yield
        except RuntimeError as error:
            raise launch.PeerLostError(
                f"rank {self.rank} {trouble} ({str(error).splitlines()[0]}); mend that, then start or resume again"
            ) from error


@contextmanager
def open_ranks(ranks: int, device: torch.device) -> Iterator[Ranks]:
    """Join the other ranks (gloo on CPU, NCCL on CUDA), and leave them at the end.

    Ranks that ``fedmoe`` started meet through a file and talk over the loopback interface. Under torchrun they use
    what torchrun set up; give it a static rendezvous, its other one reads pickle.

    Raises:
        ValueError: ``ranks`` is not the number of processes started.
        launch.PeerLostError: another rank did not come within 30 minutes.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != ranks:
        raise ValueError(
            f"ranks={ranks} but {world} process(es) run; start it with `fedmoe simulate`, with "
            "torchrun --master-addr, or set ranks"
        )
    launch.follow_parent()
    if world == 1:
        yield Ranks(device=device)
        return
    mine = Ranks(launch.rank(), world, device)
    with mine.meeting("could not join the others"):
        _join(mine, launch.meeting_place())
    try:
        yield mine
    finally:
        dist.destroy_process_group()


def _join(mine: Ranks, place: Path | None) -> None:
    backend, limit = "nccl" if mine.device.type == "cuda" else "gloo", timedelta(minutes=30)
    if place is None:
        dist.init_process_group(backend, timeout=limit)
    else:
        store = dist.FileStore(str(place), mine.world)
        dist.init_process_group(backend, store=store, rank=mine.rank, world_size=mine.world, timeout=limit)
