"""Clients and a server of secure aggregation, step by step, with a hand on every letter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from fedmoe_core.privacy.secure.ciphers import identity_of
from fedmoe_core.privacy.secure.client import Client
from fedmoe_core.privacy.secure.letters import ADVERTISE, AGREE, MASK, OPEN, SHARE, Group
from fedmoe_core.privacy.secure.server import Server

# By step and client: what becomes of its letter on the way; None = it is lost.
Meddle = Callable[[int, int, bytes], bytes | None]


def honest(step: int, client: int, letter: bytes) -> bytes | None:
    return letter


def losing(steps: Mapping[int, int]) -> Meddle:
    """Clients that drop out before a step."""
    return lambda step, client, letter: letter if steps.get(client, OPEN + 1) > step else None


@dataclass
class Play:
    """One round of ``count`` clients whose vectors are drawn."""

    count: int = 5
    threshold: int = 3
    length: int = 40
    seed: int = 0
    session: bytes = b"r" * 32
    meddle: Meddle = honest
    sent: dict[tuple[int, int], bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        draw = np.random.default_rng([self.seed, 1]).bytes
        self.secrets = {client: draw(32) for client in range(self.count)}
        self.group = Group(self.session, self.threshold, {c: identity_of(s) for c, s in self.secrets.items()})
        self.clients = {
            c: Client(c, self.secrets[c], self.group, np.random.default_rng([self.seed, 2, c]).bytes)
            for c in range(self.count)
        }
        self.server = Server(self.group, self.length)
        rng = np.random.default_rng([self.seed, 3])
        self.vectors_CN = rng.integers(-(2**62), 2**62, (self.count, self.length))

    def carried(self, step: int, client: int, letter: bytes) -> bytes | None:
        self.sent[step, client] = letter
        return self.meddle(step, client, letter)

    def collect(self, step: int, letters: Mapping[int, bytes]) -> dict[int, bytes]:
        found = {client: self.carried(step, client, letter) for client, letter in letters.items()}
        return {client: letter for client, letter in found.items() if letter is not None}

    def until_masked(self) -> None:
        letters = self.collect(ADVERTISE, {c: client.advertise() for c, client in self.clients.items()})
        keys = self.server.advertised(letters)
        going = [c for c in letters if c not in self.server.out]
        shared = self.server.shared(self.collect(SHARE, {c: self.clients[c].share(keys) for c in going}))
        for c, sealed in shared.items():
            if (letter := self.carried(MASK, c, self.clients[c].mask(sealed, self.vectors_CN[c]))) is not None:
                self.server.masked(c, letter)

    def run(self) -> np.ndarray:
        """The sum that the server opens."""
        self.until_masked()
        told = self.server.closed()
        signed = self.server.agreed(self.collect(AGREE, {c: self.clients[c].agree(told) for c in told}))
        going = [c for c in told if c not in self.server.out and self.meddle(AGREE, c, b"") is not None]
        return self.server.opened(self.collect(OPEN, {c: self.clients[c].open(signed) for c in going}))

    def expected(self) -> np.ndarray:
        """The plain sum of those whose vectors came, modulo 2^64."""
        return self.vectors_CN[sorted(self.server.survivors)].sum(axis=0)
