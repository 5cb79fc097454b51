"""Where the chance of a private run comes from: its seed, which anyone may know, or a secret of the operating system.

Who takes part in a round, and its noise, are drawn from here and from nowhere else.
"""

from __future__ import annotations

import hmac
import json
import secrets
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Protocol

import numpy as np

from fedmoe_core.base.rng import counter_rng

KEY_BYTES = 32


class Draws(Protocol):
    """Draws whole numbers; numpy's ``Generator`` does."""

    def integers(self, low: int, high: int, size: int) -> np.ndarray:
        """Draw ``size`` whole numbers from ``low`` to below ``high``, each as likely as the others, int64."""
        ...


class Chance(Protocol):
    """All chance of one round and of those after it."""

    def at(self, round: int) -> Chance:
        """Return that of a later round, counted from 0."""
        ...

    def draws(self, purpose: str, *where: int) -> Draws:
        """Return the stream of one purpose at one place of this round; equal arguments give equal streams."""
        ...


@dataclass(frozen=True)
class Seeded:
    """Chance that follows from the seed of the run: who knows it takes the noise off."""

    seed: int
    round: int = 0

    def at(self, round: int) -> Seeded:
        """Return that of another round."""
        return replace(self, round=round)

    def draws(self, purpose: str, *where: int) -> Draws:
        """Return ``counter_rng`` of the purpose, the round and the place."""
        return counter_rng(self.seed, purpose, self.round, *where)


@dataclass(frozen=True)
class Secret:
    """Chance that follows from 32 bytes of the operating system, which no one but the server has.

    The key of the next round is HMAC-SHA256 of this round's, and cannot be turned back: who takes the key of round 7
    cannot take the noise off the models before it. Each stream has a key of its own, HMAC-SHA256 of its purpose and
    place.

    Attributes:
        round: the first that can be drawn, counted from 0.
        key: of this round, 32 bytes.
    """

    round: int
    key: bytes = field(repr=False)

    @classmethod
    def new(cls) -> Secret:
        """Draw the secret of a run from the operating system."""
        return cls(0, secrets.token_bytes(KEY_BYTES))

    def at(self, round: int) -> Secret:
        """Return that of this round or a later one.

        Raises:
            ValueError: it is of an earlier one, whose key is gone.
        """
        if round < self.round:
            raise ValueError(f"round {round} was drawn from a key that is gone; go on from round {self.round}")
        key = self.key
        for _ in range(round - self.round):
            key = self._derived(key, "next")
        return Secret(round, key)

    @property
    def digest(self) -> str:
        """64 hex digits that tell this key from all others, and nothing that is drawn from it."""
        return self._derived(self.key, "digest").hex()

    def draws(self, purpose: str, *where: int) -> Draws:
        """Return the key stream of AES-256 for this purpose and place.

        Raises:
            ValueError: the package cryptography is not installed.
        """
        from fedmoe_core.privacy.stream import Stream

        return Stream(self._derived(self.key, "draw", purpose, *where))

    @staticmethod
    def _derived(key: bytes, *what: str | int) -> bytes:
        return hmac.digest(key, json.dumps(what).encode(), sha256)
