"""A client of secure aggregation: what it sends at each step, and what it refuses to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256

import numpy as np
from msgspec import msgpack

from fedmoe_core.privacy.secure.ciphers import add_mask, agreed, public_of, seal, unseal
from fedmoe_core.privacy.secure.letters import (
    ADVERTISE,
    AGREE,
    MASK,
    OPEN,
    SHARE,
    Agreed,
    Group,
    Keys,
    Masked,
    Opened,
    Pair,
    Shares,
    read,
    write,
)
from fedmoe_core.privacy.secure.shamir import SHARE_BYTES, Draw, split


class RefusalError(ValueError):
    """A client stops here: the server asked for what would betray a vector, or is not what it says."""


class Client:
    """One client in one round; each step is done once, in order. Figure 4 of the paper, signatures included.

    Args:
        number: its number in the group.
        identity: its Ed25519 secret key; the group knows the public one.
        group: what all know.
        draw: source of random bytes; a deployed client passes ``os.urandom``.
    """

    def __init__(self, number: int, identity: bytes, group: Group, draw: Draw) -> None:
        self.number, self._identity, self._group, self._draw = number, identity, group, draw
        self._seal_secret, self._mask_secret, self._seed = draw(32), draw(32), draw(32)
        self._next = ADVERTISE
        self._keys: dict[int, Keys] = {}
        self._own = Pair(b"", b"")  # its own shares of its own secrets
        self._sealed: Mapping[int, bytes] = {}
        self._survivors: list[int] = []

    def advertise(self) -> bytes:
        """Step 0: tell the public keys of this round."""
        self._enter(ADVERTISE)
        digest = sha256(self._seed).digest()
        return self._write(ADVERTISE, Keys(public_of(self._seal_secret), public_of(self._mask_secret), digest))

    def share(self, letters: Sequence[bytes]) -> bytes:
        """Step 1: share the mask key and the own mask's seed among all that told their keys, each share sealed.

        Raises:
            RefusalError: too few clients, a key twice, or the server changed this client's own.
            LetterError: a letter that its sender did not sign for this round.
        """
        self._enter(SHARE)
        for letter in letters:
            sender, keys = read(self._group, ADVERTISE, Keys, letter)
            if sender in self._keys:
                raise RefusalError(f"client {self.number} was told the keys of client {sender} twice")
            self._keys[sender] = keys
        self._enough("told their keys", self._keys)
        mine = self._keys.get(self.number)
        if mine is None or mine.seal_key != public_of(self._seal_secret):
            raise RefusalError(f"client {self.number} was not told its own keys")
        if len({key for keys in self._keys.values() for key in (keys.seal_key, keys.mask_key)}) < 2 * len(self._keys):
            raise RefusalError(f"client {self.number} was told one key of several clients")
        holders, threshold = sorted(self._keys), self._group.threshold
        mask_keys = split(self._mask_secret, holders, threshold, self._draw)
        seeds = split(self._seed, holders, threshold, self._draw)
        self._own = Pair(mask_keys[self.number], seeds[self.number])
        pairs = {other: Pair(mask_keys[other], seeds[other]) for other in holders if other != self.number}
        return self._write(SHARE, Shares({other: self._seal(other, pair) for other, pair in pairs.items()}))

    def mask(self, sealed: Mapping[int, bytes], vector_N: np.ndarray) -> bytes:
        """Step 2: send the vector under the own mask and one mask for each other client that shared its secrets.

        Args:
            sealed: by sender, what was sealed for this client.
            vector_N: int64; never changed.

        Raises:
            RefusalError: too few clients, or one that told no keys.
        """
        self._enter(MASK)
        if strange := set(sealed) - (set(self._keys) - {self.number}):
            raise RefusalError(f"client {self.number} got a share of client {min(strange)}, which told no keys")
        self._sealed = dict(sealed)
        self._enough("shared their secrets", [*sealed, self.number])
        masked_N = vector_N.astype("<i8").view("<u8")
        add_mask(masked_N, self._seed, minus=False)
        for other in sealed:
            seed = pair_seed(self._group, self._mask_secret, self._keys[other].mask_key, self.number, other)
            add_mask(masked_N, seed, minus=self.number > other)
        return self._write(MASK, Masked(masked_N.tobytes()))

    def agree(self, survivors: Sequence[int]) -> bytes:
        """Step 3: sign whose vectors the server says it has, so that it cannot tell other clients otherwise.

        Raises:
            RefusalError: too few, one that did not share its secrets, or this client is missing.
        """
        self._enter(AGREE)
        self._survivors = sorted(set(survivors))
        if strange := set(survivors) - {*self._sealed, self.number}:
            raise RefusalError(f"client {self.number} was told of a vector of client {min(strange)}, without shares")
        if self.number not in survivors:
            raise RefusalError(f"client {self.number} is not among the survivors, though it sent its vector")
        self._enough("sent their vectors", self._survivors)
        return self._write(AGREE, Agreed(self._survivors))

    def open(self, letters: Sequence[bytes]) -> bytes:
        """Step 4: of each client give one share: of the seed where its vector came, of the mask key elsewhere.

        Both would unmask the vector, so this is done once and for one list of survivors, which enough have signed.

        Raises:
            RefusalError: too few signed this client's list, or a share does not open.
            LetterError: a letter that its sender did not sign for this round.
        """
        self._enter(OPEN)
        signed = set()
        for letter in letters:
            sender, told = read(self._group, AGREE, Agreed, letter)
            if told.survivors != self._survivors:
                raise RefusalError(f"client {self.number} was told other survivors than client {sender}")
            signed.add(sender)
        self._enough("signed the survivors", signed & set(self._survivors))
        pairs = {other: self._unseal(other) for other in self._sealed} | {self.number: self._own}
        came = set(self._survivors)
        return self._write(
            OPEN,
            Opened(
                {other: pair.mask_key for other, pair in pairs.items() if other not in came},
                {other: pair.seed for other, pair in pairs.items() if other in came},
            ),
        )

    def _enter(self, step: int) -> None:
        if step != self._next:
            raise RefusalError(f"client {self.number} is at step {self._next} and does not do step {step}")
        self._next = step + 1

    def _enough(self, what: str, clients: Sequence[int] | set[int] | Mapping[int, Keys]) -> None:
        if len(clients) < self._group.threshold:
            raise RefusalError(
                f"client {self.number} knows of {len(clients)} clients that {what}, below threshold "
                f"{self._group.threshold}"
            )

    def _write(self, step: int, body: Keys | Shares | Masked | Agreed | Opened) -> bytes:
        return write(self._group, step, self.number, body, self._identity)

    def _seal(self, other: int, pair: Pair) -> bytes:
        about = _seal_purpose(self._group, self.number, other)
        return seal(agreed(self._seal_secret, self._keys[other].seal_key, about), msgpack.encode(pair), about)

    def _unseal(self, other: int) -> Pair:
        about = _seal_purpose(self._group, other, self.number)
        key = agreed(self._seal_secret, self._keys[other].seal_key, about)
        try:
            pair = msgpack.decode(unseal(key, self._sealed[other], about), type=Pair)
            if not len(pair.mask_key) == len(pair.seed) == SHARE_BYTES:
                raise ValueError("it is of another length")
            return pair
        except ValueError as error:  # msgspec's errors are ValueErrors too
            raise RefusalError(f"client {self.number} cannot open the share of client {other} ({error})") from None


def pair_seed(group: Group, secret: bytes, public: bytes, one: int, other: int) -> bytes:
    """Return the seed of the mask that two clients share: the lower number adds it, the higher takes it off."""
    low, high = sorted((one, other))
    return agreed(secret, public, b"mask" + group.session + low.to_bytes(8, "big") + high.to_bytes(8, "big"))


def _seal_purpose(group: Group, sender: int, receiver: int) -> bytes:
    return b"seal" + group.session + sender.to_bytes(8, "big") + receiver.to_bytes(8, "big")
