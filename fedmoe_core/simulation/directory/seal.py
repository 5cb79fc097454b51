"""What a finished run says of its files, so that a change after its end shows; it does not stop a forger."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import file_digest
from pathlib import Path
from typing import Any

from fedmoe_core.base.files import form_of, json_digest, opened, plain

SUMMARY = "summary.json"
SEALED = ("config.toml", "partition.json", "metrics.jsonl", "ledger.jsonl")


def sealed(out: Path, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return the summary with the sha256 of the run's files, and the digest of all that it holds.

    Raises:
        OSError: one of them cannot be read.
    """
    body = {**summary, "files": {name: _sha256(out / name) for name in SEALED}}
    return {**body, "digest": json_digest(plain(body))}


def changed_since(out: Path) -> tuple[str, ...]:
    """Name the files of a finished run that are not what they were at its end; none where its summary has no digests.

    Raises:
        ValueError, OSError: the summary cannot be read.
    """
    body = json.loads((out / SUMMARY).read_bytes())
    if not isinstance(body, dict) or "digest" not in body:
        return ()
    files = body.get("files")
    if body.pop("digest") != json_digest(body) or not isinstance(files, dict):
        return (SUMMARY,)
    return tuple(name for name in SEALED if files.get(name) != _sha256(out / name))


def _sha256(path: Path) -> str:
    """Digest of a file; empty where none is there."""
    if form_of(path) or not path.exists():
        return ""
    with opened(path) as file:
        return file_digest(file, "sha256").hexdigest()
