"""What a checkpoint says of its run beside the tensors: the round, whose it is, and what stands in the other files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from msgspec import Meta, ValidationError, convert

from fedmoe_core.simulation.directory.prefix_log import Count, Prefix, Sha256

AFRESH = "restore the run's own checkpoint, or start the run afresh"


@dataclass(frozen=True)
class Standing:
    """The facts of one checkpoint; together with its tensors and its configuration they cover every file of a run.

    Attributes:
        round: rounds on record.
        run: the id on the marker, 16 hex digits.
        identity: digests of data, model and code, as ``Identity.facts``.
        metrics, ledger: how far the logs are on record.
        partition: sha256 of ``partition.json``.
        secret: digest of the secret's key of this round; empty where the run has none.
    """

    round: Count
    run: Annotated[str, Meta(pattern=r"\A[0-9a-f]{16}\Z")]
    identity: dict[str, str]
    metrics: Prefix
    ledger: Prefix
    partition: Sha256
    secret: Annotated[str, Meta(pattern=r"\A([0-9a-f]{64})?\Z")] = ""

    def facts(self) -> dict[str, Any]:
        """Return the fields by name, for a checkpoint's ``meta``."""
        return {name: value for name, value in asdict(self).items() if name != "secret" or value}

    @classmethod
    def read(cls, meta: Mapping[str, Any], *, rounds: int, place: str) -> Standing:
        """Read what ``facts`` gave. An edited checkpoint may have its digests made again, so each field is checked.

        Args:
            meta: of a checkpoint.
            rounds: of the run's configuration.
            place: where the checkpoint lies, for the sentence.

        Raises:
            ValueError: a field is missing, unknown, of another type or out of range.
        """
        try:
            found = convert(dict(meta), cls, strict=True)
        except (ValidationError, OverflowError) as error:
            raise ValueError(f"{place} says of its run what fedmoe does not write ({error}); {AFRESH}") from None
        if found.facts() != meta:
            raise ValueError(f"{place} says more of its run than fedmoe writes; {AFRESH}")
        if found.round > rounds:
            raise ValueError(f"{place} is of round {found.round}, and the run has {rounds}; {AFRESH}")
        return found
