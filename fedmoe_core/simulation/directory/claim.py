"""Ownership of a run directory: marked before anything else, locked while in use, emptied of our own files only."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fedmoe_core.base.files import PROBE, ensure_writable, form_of, json_digest, plain, require_file, write_json
from fedmoe_core.base.halves import sweep, whose

MARKER = "fedmoe-run.json"
LOCK = "fedmoe-run.lock"
FORMAT = "fedmoe-run"
FORMAT_VERSION = 2  # 2: with a digest
LARGEST_MARKER = 1 << 16  # bytes; ours has a few hundred
LARGEST_CONFIG = 1 << 24  # bytes; a thousand budgets take some ten thousand

# Everything that fedmoe writes into a run directory; --force removes these names and nothing else.
FILES = (
    "config.toml",
    "partition.json",
    "metrics.jsonl",
    "ledger.jsonl",
    "summary.json",
    "report.html",
    "metrics.prom",
    "secret.json",
)
CHECKPOINT = "checkpoint"  # the folder; its files are named here, where no torch is, for those who only look
JSON_NAME = "checkpoint.json"
TENSOR_NAME = re.compile(r"state-[0-9a-f]{16}\.safetensors")
HALVES = (PROBE, MARKER, *FILES)
HALVES_IN_CHECKPOINT = (PROBE, JSON_NAME)


@dataclass(frozen=True)
class Claim:
    """A directory that this process holds for one run.

    Attributes:
        path: the directory.
        id: of the run, 16 hex digits; its checkpoints carry it.
        facts: what the marker says besides, once the run has begun: the digests of what the run stands on.
    """

    path: Path
    id: str
    facts: Mapping[str, Any]

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Remove what an earlier run of fedmoe left here and put this run's ``facts`` on the marker."""
        _remove_run(self.path)
        _write_marker(self.path, self.id, facts)


def refuse_claim(path: Path, *, force: bool) -> None:
    """Refuse a directory that a new run may not use; change nothing.

    A new run may use a directory that does not exist or is empty, one that fedmoe marked but where no run began, and
    with ``force`` one that holds a run.

    Raises:
        ValueError: the directory is a file, holds a run, or holds something else; one sentence with the remedy.
    """
    if not path.exists() and not path.is_symlink():
        return
    if not path.is_dir():
        raise ValueError(f"out={path} is not a directory; choose another out=DIRECTORY")
    if not (path / MARKER).is_symlink() and not _others(path):
        return
    # Without the marker nothing here is known to be ours, whatever the files are called.
    if _read_marker(path) is None:
        raise ValueError(
            f"out={path} is not empty and fedmoe did not make it (no valid {MARKER}); choose another out=DIRECTORY"
        )
    if not _holds_run(path):
        return
    if not force:
        raise ValueError(
            f"out={path} already holds a run; go on with `fedmoe resume {path}`, replace it with --force, "
            "or choose another out=DIRECTORY"
        )
    if path.is_symlink():
        raise ValueError(f"out={path} is a symbolic link, and --force follows none; name the directory it points to")
    _refuse_foreign(path)


@contextmanager
def claimed(path: Path, *, force: bool) -> Iterator[Claim]:
    """Hold ``path`` for a new run: marked first, locked until the block ends.

    An earlier run stays as it is until ``Claim.begin``. If the block fails before that, the directory is left as it was
    found.

    Args:
        path: the run directory; made if it does not exist.
        force: whether it may replace a run.

    Raises:
        ValueError: as ``refuse_claim``, or another fedmoe process is using the directory.
        OSError: the directory cannot be written.
    """
    refuse_claim(path, force=force)
    made, fresh = not path.exists(), False
    ensure_writable(path)
    try:
        with exclusive(path):
            refuse_claim(path, force=force)  # another process may have had it in between
            _sweep(path)
            claim = Claim(path, secrets.token_hex(8), {})
            fresh = not (path / MARKER).exists()
            if fresh:
                _write_marker(path, claim.id, {})
            try:
                yield claim
            finally:
                fresh = fresh and not _holds_run(path)
                if fresh:
                    (path / MARKER).unlink(missing_ok=True)
    finally:
        if fresh:  # no run began: nothing of ours stays
            (path / LOCK).unlink(missing_ok=True)
            if made:
                with suppress(OSError):  # another program's file appeared in it
                    path.rmdir()


@contextmanager
def held(path: Path) -> Iterator[Claim]:
    """Hold the directory of a run that is to go on, locked until the block ends.

    Raises:
        ValueError: there is no run of fedmoe's, one of its files is a link or a directory, or another process is using
            it.
    """
    marker, there = _read_marker(path), (path / MARKER).exists()
    if marker is None or not _holds_run(path):
        what = f"its {MARKER} is damaged or foreign" if there else f"no {MARKER} and config.toml of fedmoe's"
        remedy = "restore that file" if there else "give the directory that a run named as out"
        raise ValueError(f"{path} holds no run ({what}); {remedy}")
    _refuse_foreign(path)
    with exclusive(path):
        _sweep(path)
        yield Claim(path, marker["id"], marker)


@contextmanager
def exclusive(path: Path, lock: str = LOCK) -> Iterator[None]:
    """Keep other fedmoe processes out of ``path``, which must exist, until the block ends.

    The operating system ends the lock with the process, however that dies.

    Raises:
        ValueError: another process holds the lock.
    """
    require_file(path / lock)  # locking opens it, and empties what it opens
    file = FileLock(path / lock, timeout=0)
    try:
        file.acquire()
    except Timeout:
        raise ValueError(
            f"{path} is in use by another fedmoe process; wait until it ends, or choose another directory"
        ) from None
    try:
        yield
    finally:
        file.release()


def read_facts(path: Path) -> Mapping[str, Any] | None:
    """Return what the marker of the run in ``path`` says; None where fedmoe marked nothing or no run began."""
    return _read_marker(path) if _holds_run(path) else None


def _holds_run(path: Path) -> bool:
    """Whether a run began here: its configuration is written after the marker and before everything else."""
    return (path / "config.toml").exists() or (path / "config.toml").is_symlink()


def _others(path: Path) -> bool:
    """Whether the directory holds anything besides the lock's file and what a kill before the marker left."""
    return any(entry.name != LOCK and not _before_the_marker(entry) for entry in path.iterdir())


def _before_the_marker(entry: Path) -> bool:
    return whose(entry) in (PROBE, MARKER) and form_of(entry) == "a folder"


def _sweep(path: Path) -> None:
    """Remove the halves of files that killed processes left; the holder of the lock may, and no link is one of them."""
    sweep(path, *HALVES)  # a report is written without the lock
    if not (path / CHECKPOINT).is_symlink():
        sweep(path / CHECKPOINT, *HALVES_IN_CHECKPOINT, alone=True)


def _read_marker(path: Path) -> dict[str, Any] | None:
    marker = path / MARKER
    try:
        if marker.is_symlink() or not marker.is_file() or marker.stat().st_size > LARGEST_MARKER:
            return None
        body = json.loads(marker.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(body, dict) or body.get("format") != FORMAT or not isinstance(body.get("id"), str):
        return None
    if body.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{marker} has format version {body.get('format_version')!r:.20}, this fedmoe reads {FORMAT_VERSION}; "
            "use the fedmoe that wrote it, or choose another directory"
        )
    return body if body.pop("digest", None) == json_digest(body) else None


def _write_marker(path: Path, id: str, facts: Mapping[str, Any]) -> None:
    body = plain({"format": FORMAT, "format_version": FORMAT_VERSION, "id": id, **facts})
    write_json(path / MARKER, {**body, "digest": json_digest(body)})


def _ours(path: Path) -> Iterator[Path]:
    """Everything in the directory that bears a name which only a run gives, the marker and the lock aside."""
    for entry in sorted(path.iterdir()):
        if entry.name in FILES or whose(entry) in HALVES:
            yield entry
    saved = path / CHECKPOINT
    if saved.is_dir() and not saved.is_symlink():
        for entry in sorted(saved.iterdir()):
            if entry.name == JSON_NAME or TENSOR_NAME.fullmatch(entry.name) or whose(entry) in HALVES_IN_CHECKPOINT:
                yield entry


def _refuse_foreign(path: Path) -> None:
    """Refuse a directory in which something of our names is not what we write: a link, a directory, a device."""
    saved = path / CHECKPOINT
    for place in [saved, *_ours(path)]:
        form, right = form_of(place), "a folder" if place == saved or whose(place) else ""
        if form != right and os.path.lexists(place):  # the half of a report may just have gone
            raise ValueError(
                f"{place} is {form or 'a file'}, not of the kind that fedmoe writes; "
                "move it away, or choose another out=DIRECTORY"
            )


def _remove_run(path: Path) -> None:
    """Remove a run's files, the configuration last so that a kill in between leaves a directory that still says so."""
    if not _holds_run(path):
        return
    _refuse_foreign(path)
    ours = [entry for entry in _ours(path) if entry.name != "config.toml"]
    for entry in [*ours, path / "config.toml"]:
        if whose(entry):
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink()
    saved = path / CHECKPOINT
    if saved.is_dir() and not any(saved.iterdir()):
        saved.rmdir()
