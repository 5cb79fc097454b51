"""How messages reach devices and come back, whatever carries them; and who is where."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, Protocol

import numpy as np
from torch import Tensor

from fedmoe_core.messages.plan import ExpertPlan
from fedmoe_core.messages.wire.base import Base, Place, base_params, expert_digest, places_of
from fedmoe_core.messages.wire.envelope import WireError
from fedmoe_core.messages.wire.greeting import Description, Greeting, doubles, greeting_bytes, read_description
from fedmoe_core.model.spec import ModelSpec

Kind = Literal["query", "train"]  # a greeting, a task
LOOK_AGAIN = 0.2  # seconds between two looks at who is connected


class FailedReply(str):
    """Why a device sent something else than an answer, in words."""


class Exchange(Protocol):
    """Carries bytes to devices. An address is good as long as the device stays connected, and says nothing else."""

    def addresses(self) -> list[int]:
        """Return where devices are connected now."""
        ...

    def send(
        self, kind: Kind, messages: Iterable[tuple[int, bytes]], seconds: float
    ) -> Iterator[tuple[int, bytes | FailedReply]]:
        """Send a message to each address; yield replies as they come, and end after ``seconds`` at the latest.

        Messages are made as they are asked for, so that the server need not hold all of them.
        """
        ...


class Bases:
    """Which client has the frozen base of which experts; this changes while a run goes on."""

    def __init__(self) -> None:
        self._digests: dict[Place, str] = {}  # what is frozen is the same in every round
        self._has: dict[int, np.ndarray] = {}  # by client, bool (L, E)

    def asked(self, spec: ModelSpec, plan: ExpertPlan, params: Mapping[str, Tensor]) -> Base | None:
        """Return what a task says of the base: what this client has does not travel; None where it keeps nothing.

        A client that this process has not sent any is taken to have what its plan says: the server was started again.
        """
        specs, cached_LE = base_params(spec, plan), plan.extras.cached_LE
        if cached_LE is None or not specs:
            self._has.setdefault(plan.client, np.zeros_like(plan.permitted_LE))  # it was not told to keep anything
            return None
        has_LE = self._has.setdefault(plan.client, cached_LE.copy())
        places = places_of(plan.permitted_LE)
        for place in places:
            if place not in self._digests:
                self._digests[place] = expert_digest(specs, place, plan, params)
        return Base(plan.permitted_LE & cached_LE & has_LE, {place: self._digests[place] for place in places})

    def heard(self, plan: ExpertPlan, *, lost: bool) -> None:
        """Remember that a client has now what was sent, or has lost everything."""
        if plan.extras.cached_LE is not None:
            had_LE = self._has.get(plan.client, plan.extras.cached_LE)
            self._has[plan.client] = np.zeros_like(had_LE) if lost else had_LE | plan.permitted_LE


class Roll:
    """Which client answers at which address, and what is known of it: this changes while a run goes on.

    Attributes:
        address: by client.
        described: what each client said of itself before the first round.
        trunks: digests of what each has on its disk.
        bases: which frozen experts it has.
        troubles: what came instead of a description, in words.
    """

    def __init__(self, exchange: Exchange, greeting: Greeting, clients: int) -> None:
        self.exchange, self.greeting, self.clients = exchange, greeting, clients
        self.address: dict[int, int] = {}
        self.described: dict[int, Description] = {}
        self.trunks: dict[int, set[str]] = {}
        self.bases = Bases()
        self.troubles: list[str] = []
        self._met: set[int] = set()  # addresses that have been greeted

    def gather(self, seconds: float) -> None:
        """Greet devices until every client has answered.

        Raises:
            ValueError: the time is up, two devices claim one client, or one cannot take part; each by name.
        """
        until = time.monotonic() + seconds
        while len(self.described) < self.clients:
            left = until - time.monotonic()
            new = [address for address in self.exchange.addresses() if address not in self._met]
            if left <= 0:
                missing = sorted({*range(self.clients)} - self.described.keys())
                said = f" (a device answered: {self.troubles[-1]})" if self.troubles else ""
                raise ValueError(
                    f"{len(missing)} of {self.clients} clients did not come within {seconds:g} s: "
                    f"{', '.join(map(str, missing[:20]))}{said}; start their devices, or set clients"
                )
            if new:
                self._take(self._greet(new, left))
            else:
                time.sleep(min(LOOK_AGAIN, left))

    def look_again(self, seconds: float) -> None:
        """Greet devices that have come since: a client that was restarted answers at another address.

        What it says of itself has to be what it said before; else it stays out.
        """
        here = set(self.exchange.addresses())
        for client in [client for client, address in self.address.items() if address not in here]:
            del self.address[client]
        new = [address for address in here if address not in self._met]
        if len(self.address) == self.clients or not new:
            return
        found = self._greet(new, seconds)
        self._met.update(new)  # who is silent now would cost every round as much
        twice = doubles([told.client for told in found.values()])
        for address, told in found.items():
            known = self.described.get(told.client)
            same = known is not None and _facts(known) == _facts(told)
            if same and not told.trouble and told.client not in self.address and told.client not in twice:
                self.address[told.client] = address
                self.trunks[told.client] = set(told.trunks)

    def _greet(self, addresses: Sequence[int], seconds: float) -> dict[int, Description]:
        message = greeting_bytes(self.greeting)
        found = {}
        for address, reply in self.exchange.send("query", [(each, message) for each in addresses], seconds):
            if address not in addresses:
                continue
            if isinstance(reply, FailedReply):
                self.troubles.append(str(reply))
                continue
            try:
                found[address] = read_description(reply, self.greeting.session)
            except WireError as error:
                self.troubles.append(str(error))
                self._met.add(address)  # what speaks in another way is not asked again
        self._met |= found.keys()
        return found

    def _take(self, found: Mapping[int, Description]) -> None:
        for address in sorted(found):
            told = found[address]
            named = f"client {told.client} ({told.name or 'without a name'})"
            if told.trouble:
                raise ValueError(f"{named} cannot take part: {told.trouble}; mend that device and start again")
            if told.client >= self.clients:
                raise ValueError(f"{named} is not in a run of {self.clients} clients; they count from 0")
            if told.code != self.greeting.code:
                raise ValueError(f"{named} has fedmoe {told.code}, and this is {self.greeting.code}; install the same")
            if told.vocabulary != self.greeting.vocabulary.digest:
                raise ValueError(f"{named} encoded its text by another vocabulary; delete its cache")
            if told.client in self.described:
                both = sorted({self.described[told.client].name or "without a name", told.name or "without a name"})
                raise ValueError(
                    f"two devices say that they are client {told.client} ({' and '.join(both)}); give each its own "
                    "client=NUMBER"
                )
            self.described[told.client], self.address[told.client] = told, address
            self.trunks[told.client] = set(told.trunks)


def _facts(told: Description) -> tuple[object, ...]:
    """What may not change while a run goes on."""
    return told.code, told.vocabulary, told.tokens, told.rows, told.validation_tokens, told.validation_rows, told.counts
