"""One round of secure aggregation with simulated clients: real letters, drawn keys, and clients that drop out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from hashlib import sha256

import numpy as np

from fedmoe_core.base.rng import counter_rng
from fedmoe_core.privacy.secure.ciphers import identity_of
from fedmoe_core.privacy.secure.client import Client
from fedmoe_core.privacy.secure.letters import ADVERTISE, AGREE, MASK, OPEN, SHARE, Group
from fedmoe_core.privacy.secure.server import Server, TooFewError

STAYS = OPEN + 1


class SimulatedRound:
    """Server and all clients of one round; every rank plays all of them alike but for the vectors.

    Args:
        clients: of the round.
        threshold: fewest of them that open the sum.
        length: words of a vector.
        key: the run's seed and the round, from which all keys are drawn; the sum does not depend on them.
        drops: by client, the step before which it drops out; others stay.

    Attributes:
        trouble: why the sum of this round stays closed; empty while it may open.
    """

    def __init__(
        self,
        clients: Collection[int],
        threshold: int,
        *,
        length: int,
        key: tuple[int, int],
        drops: Mapping[int, int],
    ) -> None:
        seed, round = key
        secrets = {client: counter_rng(seed, "secure-identity", client).bytes(32) for client in clients}
        identities = {client: identity_of(secret) for client, secret in secrets.items()}
        self._group = Group(sha256(f"fedmoe/{seed}/{round}".encode()).digest(), threshold, identities)
        self.server, self.trouble = Server(self._group, length), ""
        self._drops, self._sent = drops, set[int]()
        self._clients = {
            client: Client(client, secret, self._group, counter_rng(seed, "secure-keys", round, client).bytes)
            for client, secret in secrets.items()
        }
        self._sealed: dict[int, dict[int, bytes]] = {}
        try:
            keys = self.server.advertised({c: self._clients[c].advertise() for c in self._at(ADVERTISE, clients)})
            sharing = {c: self._clients[c].share(keys) for c in self._at(SHARE, clients)}
            self._sealed = self.server.shared(sharing)
        except TooFewError as error:
            self.trouble = str(error)

    def send(self, client: int, vector_N: np.ndarray) -> str:
        """Mask and send the vector of one client, int64; return why it is left out, empty if it is not."""
        if self.trouble or not self._at(MASK, [client]):
            return self.trouble or f"client {client} dropped out"
        self._sent.add(client)
        return self.server.masked(client, self._clients[client].mask(self._sealed[client], vector_N))

    def opened(self, total_N: np.ndarray, survivors: Collection[int]) -> np.ndarray | None:
        """Return the sum of the vectors of all survivors, int64; None where it stays closed, and ``trouble`` says why.

        Args:
            total_N: sum of their masked vectors over all ranks, uint64.
            survivors: of all ranks.
        """
        if self.trouble:
            return None
        server, clients = self.server, self._clients
        server.total_N, server.survivors = total_N, set(survivors)
        for client in set(survivors) - self._sent:  # their vectors were sent on other ranks; here they only keep step
            clients[client].mask(self._sealed[client], np.zeros(0, dtype=np.int64))
        try:
            told = server.closed()
            signed = server.agreed({c: clients[c].agree(told) for c in self._at(AGREE, told)})
            return server.opened({c: clients[c].open(signed) for c in self._at(OPEN, told)})
        except TooFewError as error:
            self.trouble = str(error)
            return None

    def _at(self, step: int, clients: Collection[int]) -> list[int]:
        """Those that still take part at a step."""
        return [client for client in sorted(clients) if self._drops.get(client, STAYS) > step]
