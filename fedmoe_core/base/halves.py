"""What is being written lies in a folder of its own, named after its writer: what a kill leaves there can be removed.

Libraries put files of their own beside the one they write: safetensors one that begins with ``.tmp`` and is as large as
the model. A kill leaves those too, so a name alone for the new file is not enough.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

AGE = 24 * 3600.0  # seconds without a change after which the writer on another machine counts as gone
_NAME = re.compile(r"\.(.+)\.([A-Za-z0-9_-]*)-(\d+)-[a-z0-9_]+\.half")


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Make a folder beside ``path`` for what is to become it; it goes with all that is still in it.

    What killed writers of the same file left goes first.

    Raises:
        OSError: the folder of ``path`` cannot be written.
    """
    sweep(path.parent, path.name)
    half = Path(tempfile.mkdtemp(prefix=f".{path.name}.{_machine()}-{os.getpid()}-", suffix=".half", dir=path.parent))
    try:
        yield half
    finally:
        shutil.rmtree(half, ignore_errors=True)


def whose(entry: Path) -> str:
    """Return the name of the file of which ``entry`` is a half, by its own name; empty where it is none."""
    found = _NAME.fullmatch(entry.name)
    return found[1] if found else ""


def sweep(folder: Path, *names: str, alone: bool = False) -> None:
    """Remove the halves of files whose writers are gone; a link or a file with such a name stays.

    Args:
        folder: where to look.
        names: of the files.
        alone: whether the caller holds the folder, so that no half in it is being written.
    """
    with suppress(OSError), os.scandir(folder) as entries:  # a folder that may not be listed, or is not there
        # By the ending first: a cache holds a file for each of thousands of experts, and each new one sweeps.
        found = [
            Path(entry) for entry in entries if entry.name.endswith(".half") and entry.is_dir(follow_symlinks=False)
        ]
        for half in found:
            if whose(half) in names and (alone or _is_left(half)):
                shutil.rmtree(half, ignore_errors=True)


def _is_left(half: Path) -> bool:
    """Whether its writer is gone. Processes of other machines are not seen from here: their halves have to age."""
    found = _NAME.fullmatch(half.name)
    if found is not None and found[2] == _machine():
        return not _is_running(int(found[3]))
    try:
        return time.time() - half.stat().st_mtime > AGE
    except OSError:  # it went just now
        return False


def _machine() -> str:
    """Name what numbers processes: the machine, and on Linux the container. Several may share a disk and a number."""
    try:
        numbering = str(os.stat("/proc/self/ns/pid").st_ino)
    except OSError:
        numbering = ""
    return re.sub(r"[^A-Za-z0-9_-]", "_", f"{platform.node()}-{numbering}")


def _is_running(process: int) -> bool:
    """Whether a process of this number runs here."""
    try:
        os.kill(process, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True
