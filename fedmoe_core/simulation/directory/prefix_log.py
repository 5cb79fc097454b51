"""The logs of a run: a line counts once a checkpoint covers it, by number, bytes and digest of all up to it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from fedmoe_core.base.files import opened, plain, read_json_lines

CHUNK = 1 << 20  # bytes read at once
LONGEST_TAIL = 1 << 30  # bytes; a thousand clients with 48 layers of 128 experts write 40 MB in a round
LONGEST_LINE = 1 << 26

Count = Annotated[int, Meta(ge=0, le=2**62)]
Sha256 = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]


@dataclass(frozen=True)
class Prefix:
    """The part of a log that is on record.

    Attributes:
        lines, bytes: its length.
        sha256: of its bytes, 64 hex digits.
    """

    lines: Count
    bytes: Count
    sha256: Sha256


class PrefixLog:
    """A file of JSON lines that only this process appends to, with a digest of all of it that grows line by line.

    Records are appended before the checkpoint that covers them is committed. So after a kill the file holds at least
    what the checkpoint counted, and at most one round more, of which the last line may be cut.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines, self._bytes, self._digest = 0, 0, sha256()

    @classmethod
    def create(cls, path: Path) -> PrefixLog:
        """Make the file, empty.

        Raises:
            OSError: something lies there already, or the directory cannot be written.
        """
        path.touch(exist_ok=False)
        return cls(path)

    @classmethod
    def reopen(cls, path: Path, prefix: Prefix, *, round: int) -> PrefixLog:
        """Go on after ``prefix``, which the file must begin with; what an unfinished round wrote after it goes.

        Args:
            path: the file.
            prefix: what the checkpoint counted.
            round: the last round of that checkpoint; lines after the prefix are of the next one, or cut.

        Raises:
            ValueError: the file was cut, changed, or has lines of other rounds after the prefix; nothing was changed.
            OSError: it cannot be read or written.
        """
        log = cls(path)
        try:
            with opened(path, write=True) as file:
                size = os.fstat(file.fileno()).st_size
                if size < prefix.bytes:
                    raise ValueError(f"{path} was cut: {size} bytes of the {prefix.bytes} that the checkpoint counted")
                while log._bytes < prefix.bytes and (data := file.read(min(CHUNK, prefix.bytes - log._bytes))):
                    log._feed(data)
                if log.prefix() != prefix:
                    raise ValueError(f"{path} is not what this run wrote: its first {prefix.lines} lines were changed")
                if size - prefix.bytes > LONGEST_TAIL:
                    raise ValueError(f"{path} has {size - prefix.bytes} bytes after the last round on record")
                _refuse_other_tail(path, file, round + 1)
                file.truncate(prefix.bytes)
                os.fsync(file.fileno())
        except FileNotFoundError:
            raise ValueError(f"{path} is missing; restore it, or start the run afresh") from None
        except ValueError as error:
            remedy = "" if ";" in str(error) else "; restore it, or start the run afresh"
            raise ValueError(f"{error}{remedy}") from None
        return log

    def prefix(self) -> Prefix:
        """Return what is on record once a checkpoint says so; takes microseconds, however long the log is."""
        return Prefix(self._lines, self._bytes, self._digest.hexdigest())

    def append(self, *records: Mapping[str, Any]) -> None:
        """Write records in one go and wait until they are on disk.

        numpy scalars and arrays become numbers and lists; NaN and infinity, unknown to JSON, become null.

        Raises:
            OSError: the disk is full, the file is gone, or another program changed it; one sentence. Of these records
                nothing stays.
        """
        data = "".join(json.dumps(plain(record), allow_nan=False) + "\n" for record in records).encode()
        try:
            with opened(self.path, write=True) as file:
                if (size := os.fstat(file.fileno()).st_size) != self._bytes:
                    raise OSError(f"another program wrote it: {size} bytes, not {self._bytes}")
                try:
                    _write_all(file.fileno(), data, self._bytes)
                except OSError:
                    with suppress(OSError):
                        file.truncate(self._bytes)
                    raise
        except FileNotFoundError:
            raise OSError(f"{self.path} is gone; put its folder back and resume, or start the run afresh") from None
        except (OSError, ValueError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or error
            raise OSError(
                f"{self.path} cannot be written ({reason}); mend that and resume, the last checkpoint is intact"
            ) from error
        self._feed(data)

    def read(self) -> list[dict[str, Any]]:
        """Read all complete records.

        Raises:
            ValueError: as ``read_json_lines``.
        """
        return [record for _, record in read_json_lines(self.path)]

    def _feed(self, data: bytes) -> None:
        self._lines += data.count(b"\n")
        self._bytes += len(data)
        self._digest.update(data)


def _refuse_other_tail(path: Path, file: FileIO, next_round: int) -> None:
    """Refuse whole lines of another round from here to the end: a doubled log, or that of another run.

    What is not JSON may stay from a power cut and goes with the rest.
    """
    lines = BufferedReader(file, CHUNK)
    while line := lines.readline(LONGEST_LINE):
        try:
            record = json.loads(line) if line.endswith(b"\n") else None
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and record.get("round") != next_round:
            raise ValueError(
                f"{path} goes on after the last round on record with a line of round {record.get('round')!r:.20}, "
                f"where {next_round} would be next"
            )
    lines.detach()


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    """Write at a place and wait until all of it is on disk; a full disk may take a part first."""
    left = memoryview(data)
    while left:
        done = os.pwrite(descriptor, left, offset)
        left, offset = left[done:], offset + done
    os.fsync(descriptor)
