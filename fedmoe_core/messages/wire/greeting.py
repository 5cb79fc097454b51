"""What server and device say before the first round: which run this is, and what the device has."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from fedmoe_core.messages.wire.envelope import WireError, seal, unseal

LARGEST_GREETING = 64 << 20  # bytes; a tokenizer of 150,000 tokens is 11 MB
LARGEST_DESCRIPTION = 4 << 20
MOST_TOKENS = 1 << 40
Count = Annotated[int, Meta(ge=0, le=MOST_TOKENS)]
Text = Annotated[str, Meta(max_length=300)]


class Vocabulary(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How text becomes numbers in a run.

    Attributes:
        kind, tokenizer, end: as ``TextTokenizer``; ``tokenizer`` is its JSON.
        classes: names of the classes, in the order of their numbers; empty for language modelling.
    """

    kind: Literal["bpe", "bpe-lower", "word", "model"]
    tokenizer: str
    end: str
    classes: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Hex sha256 of all of it."""
        return sha256(msgspec.json.encode(self)).hexdigest()


class Greeting(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the server tells every device.

    Attributes:
        session: names this run; the answer has to repeat it.
        config: the configuration as TOML.
        code: version of the server's fedmoe and adapter.
        vocabulary: how text becomes numbers.
    """

    session: str
    config: str
    code: str
    vocabulary: Vocabulary


class Description(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a device tells of itself; the server believes the types and bounds, and compares versions.

    Attributes:
        session: of the greeting.
        client: which of the run's clients it is, from 0.
        name: for people.
        trouble: why it cannot take part; empty where it can.
        code, torch: versions.
        vocabulary: digest of the vocabulary by which its text was encoded.
        tokens, rows: of its private text.
        validation_tokens, validation_rows: of the text that it holds back for validation.
        counts: private rows of each class, or tokens of each domain that the server's corpus knows; may be empty.
        budget: its own limits, in the words of ``budgets``; empty = as the server's configuration says.
        trunks: digests of the trunks that it has from before.
    """

    session: Text
    client: Annotated[int, Meta(ge=0, le=1 << 30)]
    name: Text
    trouble: str = ""
    code: Text = ""
    torch: Text = ""
    vocabulary: Text = ""
    tokens: Count = 0
    rows: Count = 0
    validation_tokens: Count = 0
    validation_rows: Count = 0
    counts: Annotated[list[Count], Meta(max_length=100_000)] = []
    budget: Text = ""
    trunks: Annotated[list[Text], Meta(max_length=1000)] = []


def greeting_bytes(greeting: Greeting) -> bytes:
    """Put a greeting into bytes."""
    return seal(greeting, {})


def read_greeting(data: bytes) -> Greeting:
    """Read a greeting.

    Raises:
        WireError: as ``unseal``.
    """
    return unseal(data, Greeting, largest=LARGEST_GREETING)[0]


def description_bytes(description: Description) -> bytes:
    """Put a description into bytes."""
    return seal(description, {})


def read_description(data: bytes, session: str) -> Description:
    """Read what a device tells of itself.

    Raises:
        WireError: as ``unseal``, or it is for another run.
    """
    found = unseal(data, Description, largest=LARGEST_DESCRIPTION)[0]
    if found.session != session:
        raise WireError(f"a description is for run {found.session!r:.40}, not for run {session!r:.40}")
    return found


def doubles(clients: Sequence[int]) -> set[int]:
    """Return the numbers that stand there more than once.

    Example:
        >>> doubles([0, 2, 1, 2])
        {2}
    """
    return {client for client in clients if clients.count(client) > 1}
