"""Messages of secure aggregation as signed bytes: who says what, in which round and at which step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from msgspec import MsgspecError, Struct, msgpack

from fedmoe_core.privacy.secure.ciphers import is_signed, signature

ADVERTISE, SHARE, MASK, AGREE, OPEN = range(5)  # the steps: the paper's rounds 0 to 4
PREFIX = b"fedmoe secure aggregation 1"  # so that no signature made for anything else fits


class Letter(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What travels: a body and who signed it for which session and step."""

    session: bytes
    step: int
    sender: int
    body: bytes
    signature: bytes


class Keys(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Step 0: public keys of one round, to seal shares and to agree on masks, and the digest of the own mask's seed."""

    seal_key: bytes
    mask_key: bytes
    seed_digest: bytes


class Shares(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Step 1: by receiver, a sealed ``Pair``."""

    sealed: dict[int, bytes]


class Pair(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a receiver keeps of a sender: a share of its mask key, and one of its own mask's seed."""

    mask_key: bytes
    seed: bytes


class Masked(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Step 2: the masked vector, little-endian words of 64 bits."""

    words: bytes


class Agreed(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Step 3: whose vectors the server says it has, ascending."""

    survivors: list[int]


class Opened(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Step 4: of each client one of two shares: of the seed where its vector came, of the mask key where it did not."""

    mask_keys: dict[int, bytes]
    seeds: dict[int, bytes]


Body = TypeVar("Body", Keys, Shares, Masked, Agreed, Opened)


class LetterError(ValueError):
    """A letter that is not what was asked for, from whom it was asked, or untouched."""


@dataclass(frozen=True)
class Group:
    """What all parties of one round know beforehand.

    Attributes:
        session: 32 bytes, never used for another round or run.
        threshold: fewest clients with which the server opens a sum; at least 2.
        identities: Ed25519 public key of each client of the round.
    """

    session: bytes
    threshold: int
    identities: Mapping[int, bytes]


def write(group: Group, step: int, sender: int, body: Struct, secret: bytes) -> bytes:
    """Return a signed letter; ``secret`` is the sender's Ed25519 key."""
    packed = msgpack.encode(body)
    signed = signature(secret, _signed(group.session, step, sender, packed))
    return msgpack.encode(Letter(group.session, step, sender, packed, signed))


def read(group: Group, step: int, kind: type[Body], data: bytes) -> tuple[int, Body]:
    """Return the sender and the body of a letter of this round and step.

    Raises:
        LetterError: it is anything else, in words fit for the ledger.
    """
    try:
        letter = msgpack.decode(data, type=Letter)
    except MsgspecError as error:
        raise LetterError(f"is not a letter ({error})") from None
    if letter.sender not in group.identities:
        raise LetterError(f"is from client {letter.sender}, which takes no part in this round")
    if letter.session != group.session:
        raise LetterError("belongs to another round or run")
    if letter.step != step:
        raise LetterError(f"is for step {letter.step}, not for step {step}")
    message = _signed(letter.session, letter.step, letter.sender, letter.body)
    if not is_signed(group.identities[letter.sender], letter.signature, message):
        raise LetterError(f"is not signed by client {letter.sender}, or was changed on its way")
    try:
        return letter.sender, msgpack.decode(letter.body, type=kind)
    except MsgspecError as error:
        raise LetterError(f"does not hold what step {step} asks for ({error})") from None


def _signed(session: bytes, step: int, sender: int, body: bytes) -> bytes:
    """The bytes under a signature; those before the body have a fixed length."""
    return PREFIX + session + step.to_bytes(1, "big") + sender.to_bytes(8, "big") + body
