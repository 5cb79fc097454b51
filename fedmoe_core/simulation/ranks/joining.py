"""How the ranks of a run find each other: within a bounded time, and a rank that does not come is named."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import torch.distributed as dist

from fedmoe_core.simulation import launch

JOIN = "FEDMOE_JOIN_SECONDS"  # how long a rank waits for the others at the start
WAIT = "FEDMOE_WAIT_SECONDS"  # how long it waits for them at each meeting of a round
DEFAULTS = {JOIN: 600.0, WAIT: 1800.0}
STEP = 0.05  # seconds between two looks; Python handles a signal between them, which a wait inside torch does not


def patience(name: str) -> timedelta:
    """Return how long to wait, from the environment.

    Raises:
        ValueError: the variable holds no number above 0.
    """
    text = os.environ.get(name, "")
    seconds = DEFAULTS[name]
    if text:
        with suppress(ValueError):
            seconds = float(text)
            if 0 < seconds <= 1e7:
                return timedelta(seconds=seconds)
        raise ValueError(f"{name}={text!r} is not a number of seconds above 0; give one such as 600, or unset it")
    return timedelta(seconds=seconds)


def meet(rank: int, world: int, place: Path | None) -> dist.Store:
    """Return a store in which every rank of this start has left its name.

    Args:
        rank, world: this process and their number.
        place: the file through which ranks of one machine meet; None = the address that a launcher set.

    Raises:
        launch.PeerLostError: some rank did not come in time; it names which.
        ValueError: the launcher named no address.
        RuntimeError: the store cannot be reached.
    """
    limit = patience(JOIN)
    deadline = time.monotonic() + limit.total_seconds()
    store = dist.FileStore(str(place), world) if place else _store_of_launcher(rank, world, deadline)
    # torchrun keeps one store over all its restarts; what an earlier attempt wrote would lead to ranks that are gone.
    store = dist.PrefixStore(f"fedmoe/{os.environ.get(launch.ATTEMPT, '0')}", store)
    store.set(f"here/{rank}", "1")
    missing = list(range(world))
    while missing := [number for number in missing if not store.check([f"here/{number}"])]:
        if time.monotonic() > deadline:
            raise launch.PeerLostError(
                f"rank {rank} waited {limit.total_seconds():g} s for {named(missing)} of {world}, which did not come; "
                f"see why there, or raise {JOIN}"
            )
        time.sleep(STEP)
    return store


def named(ranks: Sequence[int]) -> str:
    """Name ranks in ascending order, neighbours as a span: ``ranks 1, 4-7``."""
    cuts = [place for place, (one, other) in enumerate(pairwise(ranks), start=1) if other != one + 1]
    spans = [ranks[begin:end] for begin, end in pairwise([0, *cuts, len(ranks)])]
    words = ", ".join(f"{span[0]}-{span[-1]}" if len(span) > 1 else str(span[0]) for span in spans)
    return f"rank {words}" if len(ranks) == 1 else f"ranks {words}"


def _store_of_launcher(rank: int, world: int, deadline: float) -> dist.Store:
    """Open the store at the launcher's address, in short tries: each is deaf to signals while it lasts."""
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not address or not port.isdecimal():
        raise ValueError(
            "WORLD_SIZE is set but MASTER_ADDR or MASTER_PORT is not; start ranks with torchrun --master-addr, or "
            "unset WORLD_SIZE"
        )
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    while True:
        try:
            store = dist.TCPStore(
                address,
                int(port),
                world,
                is_master=hosts,
                timeout=timedelta(seconds=5),
                wait_for_workers=False,
                multi_tenant=True,
            )
        except dist.DistNetworkError:
            if hosts or time.monotonic() > deadline:
                raise
            time.sleep(STEP)
        else:
            store.set_timeout(patience(WAIT))
            return store
