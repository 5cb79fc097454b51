"""Many processes, one round: which rank trains which client, and reports gathered as JSON."""

from __future__ import annotations

import json
import os
import re
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

# Its functions take the group of the moment of import as a default value. If that moment comes later (the first
# optimizer brings it), the group outlives destroy_process_group, and a thread of gloo that lets go of a tensor while
# Python ends aborts the process: seen in 1 of about 100 ranks on two busy cores.
import torch.distributed.nn.functional
from torch import Tensor

from fedmoe_core.simulation import launch
from fedmoe_core.simulation.ranks.joining import WAIT, meet, patience

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
        mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        return [json.loads(part.numpy().tobytes().decode()) for part in self.gather_tensors(mine)]

    def gather_tensors(self, values: Tensor) -> list[Tensor]:
        """Return every rank's one-dimensional tensor, of any length and one dtype, on the CPU and in rank order."""
        if self.world == 1:
            return [values.cpu()]
        mine = values.to(self.device)
        sizes = torch.zeros(self.world, dtype=torch.int64, device=self.device)
        sizes[self.rank] = mine.numel()
        with self.meeting():
            dist.all_reduce(sizes)
            padded = torch.zeros(int(sizes.max()), dtype=mine.dtype, device=self.device)
            padded[: mine.numel()] = mine
            parts = [torch.empty_like(padded) for _ in range(self.world)]
            dist.all_gather(parts, padded)
        return [part[:size].cpu() for part, size in zip(parts, sizes.tolist(), strict=True)]

    def wait(self) -> None:
        """Return once every rank is here."""
        if self.world > 1:
            with self.meeting():
                dist.barrier()

    @contextmanager
    def meeting(self, trouble: str = "lost the others") -> Iterator[None]:
        """Turn the error of a collective into one that says what it means: backends raise a bare RuntimeError.

        Raises:
            launch.PeerLostError: another rank ended, or did not come in time.
        """
        try:
            yield
        except RuntimeError as error:
            traceback.clear_frames(error.__traceback__)  # those of torch hold the group, which must end with the run
            raise launch.PeerLostError(
                f"rank {self.rank} {trouble} ({_words(error)}); mend that, then start or resume again"
            ) from error

    @contextmanager
    def together(self, stage: str) -> Iterator[None]:
        """Leave the block only if every rank did: what one raises ends all of them at once, and the others name it.

        The block holds no collective. Without this the others would wait in the next one for a rank that is gone, over
        NCCL until its time is up.

        Args:
            stage: what the block does, such as "training round 3".

        Raises:
            launch.PeerLostError: another rank raised.
        """
        if self.world == 1:
            yield
            return
        try:
            yield
        except Exception as error:
            with suppress(launch.PeerLostError):  # what happened here is the cause, and says more
                self.gather(f"{type(error).__name__}: {_words(error)}")
            raise
        for rank, trouble in enumerate(self.gather("")):
            if trouble:
                raise launch.PeerLostError(
                    f"rank {rank} failed while {stage} ({trouble}), so rank {self.rank} stops; mend that, then start "
                    "or resume again"
                )


@contextmanager
def open_ranks(ranks: int, device: torch.device) -> Iterator[Ranks]:
    """Join the other ranks (gloo on CPU, NCCL on CUDA), and leave them at the end.

    Ranks that ``fedmoe`` started meet through a file and talk over the loopback interface. Under torchrun they use
    what torchrun set up; give it a static rendezvous, its other one reads pickle.

    Raises:
        ValueError: ``ranks`` is not the number of processes started.
        launch.PeerLostError: another rank did not come in time.
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
    backend = "nccl" if device.type == "cuda" else "gloo"
    with mine.meeting("could not join the others"):
        store = meet(mine.rank, world, launch.meeting_place())
        dist.init_process_group(
            backend,
            store=store,
            rank=mine.rank,
            world_size=world,
            timeout=patience(WAIT),
            device_id=device if backend == "nccl" else None,
        )
    try:
        yield mine
    finally:
        dist.destroy_process_group()


def _words(error: Exception) -> str:
    """The first line of an error, without the place in the source that gloo puts first and the advice it adds."""
    first = (str(error).splitlines() or [""])[0]
    return re.sub(r"^\[\S+:\d+\] |\. This is typically caused.*$", "", first)
