"""Files that are whole or not there, directories that can be written, and logs that survive a kill in mid-line."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class JsonlLog:
    """``metrics.jsonl`` and ``ledger.jsonl``: a line counts once its newline is on disk.

    Records are appended before the checkpoint that covers them is committed, so on resume the file holds at least
    the lines that the checkpoint counted, and ``truncate`` drops what came after.

    Attributes:
        path: the file; made on the first append, its directory must exist.
    """

    path: Path

    def append(self, *records: Mapping[str, Any]) -> None:
        """Write records in one go and wait until they are on disk; a broken last line is dropped first.

        numpy scalars and arrays become numbers and lists; NaN and infinity, unknown to JSON, become null.
        """
        data = "".join(json.dumps(plain(record), allow_nan=False) + "\n" for record in records).encode()
        with open(self.path, "a+b") as file:
            file.truncate(_end_of_lines(file.fileno()))
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[dict[str, Any]]:
        """Read all complete records; [] without a file.

        Raises:
            ValueError: as ``read_json_lines``.
        """
        return [record for _, record in read_json_lines(self.path)] if self.path.exists() else []

    def count(self) -> int:
        """Count the complete lines; 0 without a file."""
        return self.path.read_bytes().count(b"\n") if self.path.exists() else 0

    def truncate(self, keep: int) -> None:
        """Keep the first ``keep`` lines, as counted when the checkpoint was made.

        Raises:
            ValueError: the file holds fewer complete lines than that.
        """
        data = self.path.read_bytes() if self.path.exists() else b""
        lines = data.split(b"\n")[:-1]
        if not 0 <= keep <= len(lines):
            raise ValueError(
                f"{self.path} holds {len(lines)} lines, the checkpoint counted {keep}; restore the file or start afresh"
            )
        if self.path.exists():
            size = sum(len(line) + 1 for line in lines[:keep])
            with open(self.path, "r+b") as file:
                file.truncate(size)
                os.fsync(file.fileno())


def read_json_lines(
    path: Path, parse: Callable[[str], Any] = json.loads, *, lenient: bool = False
) -> list[tuple[str, dict[str, Any]]]:
    """Read a file of JSON objects, one a line; half a last line, which a kill leaves, does not count.

    Args:
        path: the file.
        parse: makes a value of a line, or raises ``ValueError``.
        lenient: pass over blank lines, and take a last line that only lacks its newline, as an editor may leave them.

    Returns:
        For each line the words that say where it is, and its object.

    Raises:
        ValueError: a line is not a JSON object, so the file is not one of ours or was edited.
        OSError: the file cannot be read.
    """
    *lines, last = path.read_bytes().split(b"\n")
    found = []
    for number, line in enumerate([*lines, last] if lenient else lines, start=1):
        if lenient and not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            record = parse(line.decode("utf-8"))
        except (ValueError, RecursionError):
            if number > len(lines):
                break
            raise ValueError(f"{where} is not JSON; remove that line or run again") from None
        if not isinstance(record, dict):
            raise ValueError(f"{where} is not a JSON object; remove that line or run again")
        found.append((where, record))
    return found


def _end_of_lines(descriptor: int) -> int:
    """Offset just past the last newline, found from the end in steps of 4 KiB."""
    end = os.fstat(descriptor).st_size
    while end:
        start = max(0, end - 4096)
        place = os.pread(descriptor, end - start, start).rfind(b"\n")
        if place >= 0:
            return start + place + 1
        end = start
    return 0


def plain(value: Any) -> Any:
    """Put ``value`` into the words of strict JSON."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a name beside ``path`` for a new file; it replaces ``path`` once the block has ended and it is on disk.

    Readers and crashes see the old file or the new one, whole. A symbolic link at ``path`` is replaced; what it points
    to is never written.

    Raises:
        OSError: the directory cannot be written, or the disk is full; the old file is intact.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.unlink(missing_ok=True)  # left by a killed process of the same number
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_whole(path: Path, text: str) -> None:
    """Write a UTF-8 file in one step; raises as ``replacing``."""
    # "x" refuses a file or link that appeared since, so nothing foreign is written through.
    with replacing(path) as partial, partial.open("x", encoding="utf-8") as file:
        file.write(text)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all; numpy values become numbers and lists, NaN and infinity null."""
    write_whole(path, json.dumps(plain(value), indent=2, allow_nan=False) + "\n")


def ensure_writable(directory: Path | str) -> Path:
    """Make ``directory`` and prove that files can be made in it, before any work is done.

    Raises:
        PermissionError: it cannot be made or written, in one sentence.
    """
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as probe:
            probe.write(b"probe")
            probe.flush()
    except OSError as error:
        raise PermissionError(
            f"cannot write to {directory} ({error.strerror or error}); choose another directory with out=DIR"
        ) from None
    return directory
