"""Files that are whole or not there and nothing but files, directories that can be written, lines of JSON."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import sha256
from io import FileIO
from pathlib import Path
from typing import Any

from fedmoe_core.base.halves import beside

PROBE = "probe"  # whose halves alone are ever there
SPACE = "look whether its folder is still there and has free space, and do it again"
FORMS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def form_of(path: Path) -> str:
    """Say what lies under a name where that is not a file of its own; empty for a file, and where nothing is."""
    try:
        mode = path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return ""
    return "" if stat.S_ISREG(mode) else FORMS.get(stat.S_IFMT(mode), "not a file")


def require_file(path: Path, *, most: int | None = None) -> None:
    """Refuse what is not a file of its own: reading a pipe waits for a writer, and a link leads to others' files.

    Args:
        path: where a file of ours lies, or nothing does.
        most: bytes that such a file can have; a larger one would fill the memory.

    Raises:
        ValueError: it is a link, a pipe, a device or a folder, or larger than that.
        OSError: it cannot be looked at.
    """
    if form := form_of(path):
        raise ValueError(f"{path} is {form}, and fedmoe writes a file there; move it away")
    if most is not None and path.exists() and (size := path.stat().st_size) > most:
        raise ValueError(f"{path} has {size} bytes, and such a file has at most {most}; restore it")


@contextmanager
def opened(path: Path, *, write: bool = False) -> Iterator[FileIO]:
    """Open a file that is there, unbuffered: never a link, and never a pipe, which would wait for its other end.

    Raises:
        ValueError: as ``require_file``.
        OSError: it is missing, or cannot be opened.
    """
    require_file(path)
    # What a name stands for may change after the look, so the opening itself follows and waits for nothing, either.
    flags = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags | (os.O_RDWR if write else os.O_RDONLY))
    with FileIO(descriptor, "r+b" if write else "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError(f"{path} is not a file; move it away")
        yield file


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
    """Give a name near ``path`` for a new file; it replaces ``path`` once the block has ended and it is on disk.

    Readers and crashes see the old file or the new one, whole. A symbolic link at ``path`` is replaced; what it points
    to is never written.

    Raises:
        OSError: the directory cannot be written, or the disk is full; the old file is intact.
    """
    with beside(path) as half:
        partial = half / path.name
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)


@contextmanager
def making(path: Path) -> Iterator[Path]:
    """Give a name near ``path`` for a new folder, which becomes ``path`` once the block has ended and it is on disk.

    Where another process has made it meanwhile, that one stays. The folders above are made.

    Raises:
        OSError: the directory cannot be written, or the disk is full, in one sentence; nothing is left then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with beside(path) as half:
        partial = half / path.name
        try:
            yield partial
            for file in partial.rglob("*"):
                if file.is_file():
                    with file.open("rb+") as open_file:
                        os.fsync(open_file.fileno())
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
                raise
            raise OSError(f"{path} cannot be written ({error.strerror}); {SPACE}") from error
        with suppress(OSError):
            partial.rename(path)
        if not path.is_dir():
            raise OSError(f"{path} cannot be written; {SPACE}")


def write_whole(path: Path, text: str, *, private: bool = False) -> None:
    """Write a UTF-8 file in one step.

    Args:
        path: where.
        text: all of it.
        private: let its owner alone read it, from its first byte on.

    Raises:
        OSError: as ``replacing``, in one sentence.
    """
    try:
        opener = _for_owner if private else None
        with replacing(path) as partial, open(partial, "w", encoding="utf-8", opener=opener) as file:
            file.write(text)
    except OSError as error:
        raise OSError(f"{path} could not be written ({error.strerror or error}); {SPACE}") from error


def _for_owner(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all; numpy values become numbers and lists, NaN and infinity null."""
    write_whole(path, json_text(value))


def json_text(value: Any) -> str:
    """Return what ``write_json`` writes."""
    return json.dumps(plain(value), indent=2, allow_nan=False) + "\n"


def json_digest(value: Any) -> str:
    """Return the sha256 of a JSON value, whatever the order of its keys: it shows damage, it does not stop a forger."""
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def ensure_writable(directory: Path | str) -> Path:
    """Make ``directory`` and prove that files can be made in it, before any work is done.

    Raises:
        PermissionError: it cannot be made or written, in one sentence.
    """
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with beside(directory / PROBE) as half:
            (half / PROBE).write_bytes(b"probe")
    except OSError as error:
        raise PermissionError(
            f"cannot write to {directory} ({error.strerror or error}); choose another directory with out=DIR"
        ) from None
    return directory
