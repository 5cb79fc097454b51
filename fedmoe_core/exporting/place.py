"""The directory of an export: ours to replace only when its marker says so, and whole or not there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fedmoe_core.base.files import SPACE, form_of, json_digest, plain, write_json
from fedmoe_core.base.halves import beside

MARKER = "fedmoe.json"
FORMAT = "fedmoe-export"
FORMAT_VERSION = 1
LARGEST_MARKER = 64 << 20  # bytes; ours has some kilobytes for every thousand experts


def read_marker(folder: Path) -> dict[str, Any] | None:
    """Return what the marker of an export says; None where there is none of ours, or it was changed."""
    path = folder / MARKER
    try:
        if form_of(path) or path.stat().st_size > LARGEST_MARKER:
            return None
        body = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(body, dict) or body.get("format") != FORMAT or not isinstance(body.get("files"), dict):
        return None
    return body if body.pop("digest", None) == json_digest(body) else None


def write_marker(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the marker of a finished folder: ``facts``, and the name and bytes of each file that is there."""
    files = {name: (folder / name).stat().st_size for name in _files(folder)}
    body = plain({"format": FORMAT, "format_version": FORMAT_VERSION, **facts, "files": files})
    write_json(folder / MARKER, {**body, "digest": json_digest(body)})


def refuse_place(out: Path, *, force: bool) -> None:
    """Refuse a directory that an export may not take; change nothing.

    It may take one that does not exist or is empty, and with ``force`` one that holds an export and nothing else.

    Raises:
        ValueError: the place is taken; one sentence with the remedy.
    """
    if not os.path.lexists(out):
        return
    if (form := form_of(out)) != "a folder":
        raise ValueError(f"{out} is {form or 'a file'}; choose another OUT")
    if not any(out.iterdir()):
        return
    facts = read_marker(out)
    if facts is None:
        raise ValueError(f"{out} is not empty and is not an export (no valid {MARKER}); choose another OUT")
    if not force:
        raise ValueError(f"{out} already holds an export; replace it with --force, or choose another OUT")
    if strange := sorted(set(_files(out)) - facts["files"].keys() - {MARKER}):
        raise ValueError(f"{out}/{strange[0]} is not of the export, and --force would remove it; move it away")


@contextmanager
def placing(out: Path, *, force: bool) -> Iterator[Path]:
    """Give an empty folder near ``out``; it becomes ``out`` once the block has ended and all of it is on disk.

    A kill leaves what was there before, or the new export. Between two renames, which take microseconds, there is
    neither: the old one then lies in the hidden folder beside, until the next export.

    Raises:
        ValueError: as ``refuse_place``, before and after the block.
        OSError: the disk is full or not writable, in one sentence; what was there is intact.
    """
    out = Path(os.path.abspath(out))
    refuse_place(out, force=force)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with beside(out) as half:
            fresh = half / out.name
            fresh.mkdir()
            yield fresh
            for name in _files(fresh):
                (fresh / name).chmod(fresh.stat().st_mode & 0o666)  # safetensors lets its owner alone read a file
                with (fresh / name).open("rb+") as file:
                    os.fsync(file.fileno())
            refuse_place(out, force=force)  # another process may have had it in between
            _swap(fresh, out, half / "before")
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise OSError(f"{out} could not be written ({reason or error}); {SPACE}") from error


def _swap(fresh: Path, out: Path, aside: Path) -> None:
    """Put a folder where another one may be; the other one comes back if that fails."""
    if out.exists():
        out.rename(aside)
    try:
        fresh.rename(out)
    except BaseException:
        if aside.exists():
            aside.rename(out)
        raise


def _files(folder: Path) -> list[str]:
    """Everything under a folder that is not itself a folder, as paths from it."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if form_of(path) != "a folder")
