"""What secure aggregation costs: seconds and bytes of one client and of the server, clients dropping out midway.

    python -m bench.secure [--clients 100] [--words 100000] [--drop 0.1] [--small] [--out FILE]

One process plays all parties, one after another. A tenth of the clients drops out before sending its vector, the worst
time to: the server then makes a mask for each pair of a lost client and another one. The opened sum is compared with
the plain one, bit for bit, before any time is reported.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.common.checkout import RESULTS
from bench.common.machine import machine
from fedmoe_core.privacy.secure.ciphers import identity_of
from fedmoe_core.privacy.secure.client import Client
from fedmoe_core.privacy.secure.letters import Group
from fedmoe_core.privacy.secure.server import Server

THRESHOLD = 0.67
T = TypeVar("T")


@dataclass(frozen=True)
class Step:
    """One step: mean seconds and bytes sent of a client that did it, seconds of the server in all."""

    name: str
    client_seconds: float
    client_bytes: float
    server_seconds: float


class Clock:
    """Seconds by party."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {"client": 0.0, "server": 0.0}

    def of(self, party: str, work: Callable[[], T]) -> T:
        """Do some work and bill it."""
        start = time.perf_counter()
        found = work()
        self.spent[party] += time.perf_counter() - start
        return found


def steps(clients: int, words: int, drop: float) -> list[Step]:
    """Play one round and time it; refuses to report a sum that is not the plain one."""
    draw = np.random.default_rng(0)
    secrets = {number: draw.bytes(32) for number in range(clients)}
    group = Group(bytes(32), math.ceil(THRESHOLD * clients), {n: identity_of(key) for n, key in secrets.items()})
    vectors = {number: draw.integers(-(2**52), 2**52, words) for number in range(clients)}
    lost = set(range(0, clients, round(1 / drop))) if drop else set()
    staying, server, found = sorted(set(range(clients)) - lost), Server(group, words), list[Step]()

    def timed(name: str, who: list[int], send: Callable[[int], bytes], take: Callable[[dict[int, bytes]], T]) -> T:
        clock = Clock()
        letters = {number: clock.of("client", lambda number=number: send(number)) for number in who}
        answer = clock.of("server", lambda: take(letters))
        size = sum(map(len, letters.values())) / len(who)
        found.append(Step(name, clock.spent["client"] / len(who), size, clock.spent["server"]))
        return answer

    party = {number: Client(number, secret, group, draw.bytes) for number, secret in secrets.items()}
    everyone = sorted(party)
    keys = timed("0 tell keys", everyone, lambda n: party[n].advertise(), server.advertised)
    sealed = timed("1 share secrets", everyone, lambda n: party[n].share(keys), server.shared)

    def add(letters: dict[int, bytes]) -> list[int]:
        for number, letter in letters.items():
            server.masked(number, letter)
        return server.closed()

    told = timed("2 send the vector", staying, lambda n: party[n].mask(sealed[n], vectors[n]), add)
    signed = timed("3 sign survivors", staying, lambda n: party[n].agree(told), server.agreed)
    total = timed("4 open", staying, lambda n: party[n].open(signed), server.opened)
    if not np.array_equal(total, sum(vectors[number] for number in staying)):
        raise SystemExit("the opened sum is not the plain one; no time is worth reporting")
    return found


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--words", type=int, default=100_000, help="values of a vector, 8 bytes each")
    parser.add_argument("--drop", type=float, default=0.1, help="share of clients that drop out before their vector")
    parser.add_argument("--small", action="store_true", help="a trial of the command, not a measurement")
    parser.add_argument("--out", type=Path, help=f"where the record goes, such as {RESULTS}/secure-cpu.json")
    words = parser.parse_args()
    clients, length = (6, 100) if words.small else (words.clients, words.words)
    load, found = os.getloadavg()[0], steps(clients, length, words.drop)
    table = Table("step", "one client, ms", "it sends, kB", "server, ms", title=f"{clients} clients x {length} words")
    for step in found:
        ms = f"{1e3 * step.client_seconds:.1f}", f"{step.client_bytes / 1e3:.1f}", f"{1e3 * step.server_seconds:.0f}"
        table.add_row(step.name, *ms)
    Console().print(table)
    record: dict[str, Any] = {"clients": clients, "words": length, "drop": words.drop, "load": load}
    record |= {"machine": machine(), "steps": [asdict(step) for step in found]}
    if words.out:
        words.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
