"""The server of secure aggregation: it relays, adds masked vectors, and asks for what opens their sum alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from hashlib import sha256

import numpy as np

from fedmoe_core.privacy.secure.ciphers import add_mask, public_of
from fedmoe_core.privacy.secure.client import pair_seed
from fedmoe_core.privacy.secure.letters import (
    ADVERTISE,
    AGREE,
    MASK,
    OPEN,
    SHARE,
    Agreed,
    Body,
    Group,
    Keys,
    LetterError,
    Masked,
    Opened,
    Shares,
    read,
)
from fedmoe_core.privacy.secure.shamir import SHARE_BYTES, join, weights_at_zero


class TooFewError(ValueError):
    """Fewer clients than the threshold are left, so the sum of this round stays closed."""


class Server:
    """The server in one round. Letters come by client: the channel on which they came, whatever they say themselves.

    Args:
        group: what all know.
        length: words of a vector.

    Attributes:
        out: clients that the server left out, with the reason.
        total_N: sum of the masked vectors modulo 2^64, uint64.
        survivors: clients whose vectors are in it.
    """

    def __init__(self, group: Group, length: int) -> None:
        self.out: dict[int, str] = {}
        self.total_N = np.zeros(length, dtype="<u8")
        self.survivors: set[int] = set()
        self._group = group
        self._keys: dict[int, Keys] = {}
        self._sharers: set[int] = set()

    def advertised(self, letters: Mapping[int, bytes]) -> list[bytes]:
        """Take the letters of step 0 and return those to pass on to all; raises as ``TooFewError`` says."""
        self._keys = self._read_all(ADVERTISE, Keys, letters, self._group.identities)
        self._enough("told their keys", self._keys)
        return [letters[client] for client in sorted(self._keys)]

    def shared(self, letters: Mapping[int, bytes]) -> dict[int, dict[int, bytes]]:
        """Take the letters of step 1 and return what to pass on: by receiver and sender, a sealed share."""
        found = self._read_all(SHARE, Shares, letters, self._keys)
        for client in list(found):
            if set(found[client].sealed) != set(self._keys) - {client}:
                self._leave_out(client, SHARE, "does not hold one share for each of the others")
                del found[client]
        self._sharers = set(found)
        self._enough("shared their secrets", found)
        return {
            receiver: {sender: body.sealed[receiver] for sender, body in found.items() if sender != receiver}
            for receiver in found
        }

    def masked(self, client: int, letter: bytes) -> str:
        """Add one masked vector of step 2; return why it is left out, empty if it is not."""
        if client in self.survivors:
            return f"client {client} sent its vector twice; the first one counts"
        found = self._read_all(MASK, Masked, {client: letter}, self._sharers)
        if client in found and len(found[client].words) != self.total_N.nbytes:
            words = len(found[client].words) / 8
            self._leave_out(client, MASK, f"holds {words:g} words, not {len(self.total_N)}")
        elif client in found:
            self.total_N += np.frombuffer(found[client].words, dtype="<u8")
            self.survivors.add(client)
            return ""
        return self.out.get(client) or self._leave_out(client, MASK, "was not asked for")

    def closed(self) -> list[int]:
        """End step 2: return whose vectors are here, which every one of them is asked to sign."""
        self._enough("sent their vectors", self.survivors)
        return sorted(self.survivors)

    def agreed(self, letters: Mapping[int, bytes]) -> list[bytes]:
        """Take the letters of step 3 and return those to pass on to all that signed."""
        found = self._read_all(AGREE, Agreed, letters, self.survivors)
        for client in [client for client, body in found.items() if body.survivors != sorted(self.survivors)]:
            self._leave_out(client, AGREE, "names other survivors")
            del found[client]
        self._enough("signed the survivors", found)
        return [letters[client] for client in sorted(found)]

    def opened(self, letters: Mapping[int, bytes]) -> np.ndarray:
        """Take the letters of step 4 and return the sum of the vectors of all survivors, int64.

        Raises:
            TooFewError: too few answered, or the shares of one client do not fit what it told at step 0.
        """
        lost = self._sharers - self.survivors
        found = self._read_all(OPEN, Opened, letters, self.survivors)
        for client in list(found):
            body = found[client]
            whole = all(len(share) == SHARE_BYTES for share in [*body.mask_keys.values(), *body.seeds.values()])
            if not whole or set(body.mask_keys) != lost or set(body.seeds) != self.survivors:
                self._leave_out(client, OPEN, "does not hold the one share of each client that was asked for")
                del found[client]
        self._enough("opened their shares", found)
        weights = weights_at_zero(sorted(found)[: self._group.threshold])
        total_N = self.total_N.copy()
        for client in sorted(self.survivors):
            seed = self._joined(client, {holder: found[holder].seeds[client] for holder in weights}, weights)
            if sha256(seed).digest() != self._keys[client].seed_digest:
                raise _unfit(client)
            add_mask(total_N, seed, minus=True)
        for client in sorted(lost):
            secret = self._joined(client, {holder: found[holder].mask_keys[client] for holder in weights}, weights)
            if public_of(secret) != self._keys[client].mask_key:
                raise _unfit(client)
            for other in sorted(self.survivors):
                seed = pair_seed(self._group, secret, self._keys[other].mask_key, client, other)
                add_mask(total_N, seed, minus=other < client)  # the lower number had added it
        return total_N.view("<i8")

    def _joined(self, client: int, shares: Mapping[int, bytes], weights: Mapping[int, int]) -> bytes:
        try:
            return join(shares, weights)
        except ValueError:
            raise _unfit(client) from None

    def _read_all(
        self, step: int, kind: type[Body], letters: Mapping[int, bytes], asked: Collection[int]
    ) -> dict[int, Body]:
        """Return the bodies of good letters by client; the senders of others are out. Silence is not a fault."""
        found = {}
        for client in sorted(set(letters) & set(asked)):
            try:
                sender, body = read(self._group, step, kind, letters[client])
            except LetterError as error:
                self._leave_out(client, step, str(error))
                continue
            if sender != client:
                self._leave_out(client, step, f"is signed by client {sender}")
            else:
                found[client] = body
        return found

    def _leave_out(self, client: int, step: int, reason: str) -> str:
        self.out[client] = f"the letter of client {client} at step {step} {reason}"
        return self.out[client]

    def _enough(self, what: str, clients: Collection[int]) -> None:
        if len(clients) < self._group.threshold:
            named = f"; {next(iter(self.out.values()))}" if self.out else ""
            raise TooFewError(
                f"only {len(clients)} of {len(self._group.identities)} clients {what}, below the threshold of "
                f"{self._group.threshold}, so the sum stays closed{named}"
            )


def _unfit(client: int) -> TooFewError:
    return TooFewError(f"the shares of client {client} do not fit what it told first, so the sum stays closed")
