"""The job in BlazeFL: its pool of processes over shared memory; run in an environment with blazefl."""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from blazefl.core import IPCMode, ProcessPoolClientTrainer, SHMHandle, deserialize_model, serialize_model

from bench.fedavg.job import CURRENT, judge, make_data, make_model, train_client


@dataclass
class Uplink:
    """What a client returns."""

    cid: int
    weights: torch.Tensor | SHMHandle


@dataclass
class Downlink:
    """What a client gets."""

    weights: torch.Tensor


@dataclass
class ClientConfig:
    """What a worker needs to know of its client."""

    cid: int
    round: int


_KEPT: dict[str, Any] = {}  # of a worker: data and model are made once, as every engine does


class Pool(ProcessPoolClientTrainer[Uplink, Downlink, ClientConfig]):
    """Trains the clients of a round in a pool of processes."""

    def __init__(self, processes: int, share: Path) -> None:
        self.num_parallels, self.share_dir, self.device = processes, share, "cpu"
        self.device_count, self.cache, self.ipc_mode = 0, [], IPCMode.SHARED_MEMORY
        self.manager = mp.Manager()  # its process keeps the event that workers watch
        self.stop_event, self.round, self.size = self.manager.Event(), 0, serialize_model(make_model())

    def progress_fn(self, it: Any) -> Any:
        """Show nothing."""
        return it

    def get_client_config(self, cid: int) -> ClientConfig:
        """Name the client."""
        return ClientConfig(cid, self.round)

    def prepare_uplink_package_buffer(self) -> Uplink:
        """Make the buffer of one client."""
        return Uplink(-1, torch.zeros_like(self.size))

    @staticmethod
    def worker(
        config: ClientConfig | Path,
        payload: Downlink | Path,
        device: str,
        stop_event: threading.Event,
        *,
        shm_buffer: Uplink | None = None,
    ) -> Any:
        """Train one client; its weights go into the buffer."""
        assert isinstance(config, ClientConfig)
        assert isinstance(payload, Downlink)
        assert shm_buffer is not None
        if not _KEPT:
            torch.set_num_threads(1)
            _KEPT.update(model=make_model(), clients=make_data()[0])
        model = _KEPT["model"]
        deserialize_model(model, payload.weights)
        train_client(model, _KEPT["clients"][config.cid], config.round, config.cid)
        shm_buffer.weights.copy_(serialize_model(model))  # type: ignore[union-attr]
        return Uplink(config.cid, SHMHandle())

    def uplink_package(self) -> list[Uplink]:
        """Hand over what came back."""
        found, self.cache = self.cache, []
        return found


def main() -> None:
    """Run the job."""
    torch.set_num_threads(1)
    model, (clients, test) = make_model(), make_data()
    total = sum(len(rows[0]) for rows in clients)
    with tempfile.TemporaryDirectory() as share:
        pool = Pool(int(sys.argv[1]), Path(share))
        for round in range(CURRENT.rounds):
            began, pool.round = time.perf_counter(), round
            pool.local_process(Downlink(serialize_model(model)), list(range(CURRENT.clients)))
            found = sorted(pool.uplink_package(), key=lambda package: package.cid)
            mean = torch.zeros_like(pool.size)
            for package in found:
                mean.add_(package.weights, alpha=len(clients[package.cid][0]) / total)  # type: ignore[arg-type]
            deserialize_model(model, mean)
            loss, accuracy = judge(model, test)
            seconds = time.perf_counter() - began
            print(json.dumps({"loss": loss, "accuracy": accuracy, "seconds": seconds, "at": time.time()}), flush=True)


if __name__ == "__main__":
    main()
