"""Files that are whole or not there, and directories that can be written."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from fedmoe_core.metrics import plain


def write_whole(path: Path, text: str) -> None:
    """Write a UTF-8 file in one step: readers and crashes see the old content or the new one.

    The text goes to a new file in the same folder, which then takes its name. A symbolic link at ``path`` is replaced;
    what it points to is never written.

    Raises:
        OSError: the directory cannot be written, or the disk is full; the old file is intact.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with contextlib.suppress(FileNotFoundError):
        partial.unlink()  # left by a killed process of the same number
    try:
        # "x" refuses a file or link that appeared since, so nothing foreign is written through.
        with partial.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


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
