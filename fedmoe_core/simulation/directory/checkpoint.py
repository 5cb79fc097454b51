"""Checkpoints that are whole or not there: safetensors next to one JSON file, which commits them by a rename.

A directory holds ``checkpoint.json`` and the ``state-<hash>.safetensors`` that it names. A save writes and syncs the
new tensor file under its own name, then replaces the JSON in one rename, then deletes what the JSON no longer names. A
kill at any point leaves the previous checkpoint or the new one. No pickle is read: safetensors is data only, and its
header is checked by the library before a byte is believed.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedmoe_core.base.files import ensure_writable, json_digest, require_file
from fedmoe_core.base.halves import beside
from fedmoe_core.base.wording import another_configuration, differing
from fedmoe_core.config.systems import RETIRED
from fedmoe_core.simulation.directory.claim import JSON_NAME, TENSOR_NAME

FORMAT = "fedmoe-checkpoint"
FORMAT_VERSION = 3  # 3: meta covers the logs and the partition by their digests
LARGEST_JSON = 64 << 20  # bytes; ours hold a few kilobytes, arrays belong into the tensors
START_AFRESH = "resume from another checkpoint or start the run afresh"


@dataclass(frozen=True)
class Checkpoint:
    """What was saved: tensors by key, the caller's ``meta``, the configuration of the run, versions of the software."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]
    config_fingerprint: dict[str, Any]
    versions: dict[str, str]


def save_checkpoint(
    directory: Path | str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], config_fingerprint: Mapping[str, Any]
) -> None:
    """Replace the checkpoint in ``directory`` in one step; the previous one stays until the new one is complete.

    Args:
        directory: one directory per run; one writer at a time.
        tensors: of any shape and dtype that safetensors knows; never changed.
        meta: plain JSON values under string keys: the round, counters, line counts of logs. Floats, NaN included, come
            back as they were, tuples as lists.
        config_fingerprint: what decides the run, plain values by dotted key; compared by ``load_checkpoint``.

    Raises:
        OSError: the disk is full or not writable, in one sentence; the previous checkpoint is intact.
    """
    directory = ensure_writable(directory)
    try:
        _save(directory, tensors, meta, config_fingerprint)
    except (OSError, SafetensorError) as error:
        _sweep(directory)
        reason = error.strerror if isinstance(error, OSError) else None
        raise OSError(
            f"could not save a checkpoint to {directory} ({reason or error}); free some space there, "
            "the previous checkpoint is intact"
        ) from error
    _sweep(directory)


def _save(directory: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    # As JSON gives it back, so that the digest of what was written is the digest of what is read.
    body = _as_json({"meta": meta, "config": config, "versions": _versions()})
    body |= {"format": FORMAT, "format_version": FORMAT_VERSION}
    with beside(directory / JSON_NAME) as half:
        partial = half / "tensors"
        save_file(_unshared(tensors), partial)
        _sync(partial)
        sha256 = _sha256(partial)
        # Named after its content: a save of equal tensors renames equal bytes over the file in use, which is harmless.
        target = directory / f"state-{sha256[:16]}.safetensors"
        os.replace(partial, target)
        body["tensors"] = {"file": target.name, "sha256": sha256, "bytes": target.stat().st_size}
        body["digest"] = json_digest(body)
        partial = half / JSON_NAME
        partial.write_text(json.dumps(body, indent=1, sort_keys=True))
        _sync(partial)
        _sync(directory)  # the tensor file's name must be on disk before the JSON that points to it
        os.replace(partial, directory / JSON_NAME)
        _sync(directory)


def load_checkpoint(directory: Path | str, *, expected_fingerprint: Mapping[str, Any] | None = None) -> Checkpoint:
    """Read the checkpoint in ``directory``, every byte of it checked by sha256.

    Args:
        directory: where ``save_checkpoint`` wrote.
        expected_fingerprint: the configuration of the run that resumes; None accepts any.

    Raises:
        ValueError: nothing there, or damaged, cut short, foreign or hostile, or made under another configuration; one
            sentence with the file and the remedy.
    """
    path = Path(directory) / JSON_NAME
    body = _read_json(path)
    if expected_fingerprint is not None:
        _compare_config(path, body["config"], expected_fingerprint)
    tensors = _read_tensors(path, body["tensors"])
    return Checkpoint(tensors, body["meta"], body["config"], body["versions"])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        require_file(path, most=LARGEST_JSON)
        raw = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: there is no checkpoint to resume; start the run afresh") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); check its permissions") from None
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is damaged or cut short: it is not JSON; {START_AFRESH}") from None
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise ValueError(f"{path} is not a fedmoe checkpoint; {START_AFRESH}")
    if body.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {body.get('format_version')!r:.20}, this fedmoe reads {FORMAT_VERSION}; "
            "resume with the fedmoe that wrote it"
        )
    if body.pop("digest", None) != json_digest(body):
        raise ValueError(f"{path} is damaged: its content does not match its digest; {START_AFRESH}")
    kinds = {"meta": dict, "config": dict, "versions": dict, "tensors": dict}
    if any(not isinstance(body.get(name), kind) for name, kind in kinds.items()):
        raise ValueError(f"{path} lacks one of {', '.join(kinds)}; {START_AFRESH}")
    return body


def _read_tensors(path: Path, entry: Mapping[str, Any]) -> dict[str, Tensor]:
    # Only a plain name of our own form: a path in a foreign JSON could point anywhere.
    name = entry.get("file")
    if not isinstance(name, str) or not TENSOR_NAME.fullmatch(name):
        raise ValueError(f"{path} names the tensor file {name!r:.60}, which is not one of ours; {START_AFRESH}")
    file = path.parent / name
    try:
        require_file(file)
        size = file.stat().st_size
        if size != entry.get("bytes"):
            raise ValueError(f"{file} has {size} bytes instead of {entry.get('bytes')!r:.20}; {START_AFRESH}")
        if _sha256(file) != entry.get("sha256"):
            raise ValueError(f"{file} is damaged: its sha256 is not the one in {path.name}; {START_AFRESH}")
        # Cloned: load_file may map the file, and a model must not depend on what happens to a file later.
        return {key: tensor.clone() for key, tensor in load_file(file).items()}
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror or error}); {START_AFRESH}") from None
    except SafetensorError as error:
        raise ValueError(f"{file} is not a safetensors file ({error!s:.80}); {START_AFRESH}") from None


def _compare_config(path: Path, saved: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    was = {key: value for key, value in saved.items() if key not in RETIRED or RETIRED[key] != value}
    if unlike := differing(was, _as_json(expected)):
        raise ValueError(
            f"{path} was made under {another_configuration(unlike)}; "
            "resume with the configuration it was made with or start afresh in another directory"
        )


def _as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` as JSON gives them back: tuples are lists, keys are strings."""
    plain: dict[str, Any] = json.loads(json.dumps(values, default=dict))  # dict: mappings of other types
    return plain


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return CPU tensors, contiguous, each with its own memory, as safetensors asks; copied only where needed."""
    own: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        own[key] = tensor
    return own


def _versions() -> dict[str, str]:
    try:
        fedmoe = version("fedmoe-core")
    except PackageNotFoundError:
        fedmoe = "not installed"
    return {"fedmoe": fedmoe, "torch": torch.__version__, "python": platform.python_version()}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on disk; Windows cannot open directories."""
    is_directory = path.is_dir()
    if is_directory and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY if is_directory else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sweep(directory: Path) -> None:
    """Delete tensor files that the JSON does not name; never anything of other names."""
    try:
        keep = json.loads((directory / JSON_NAME).read_bytes())["tensors"]["file"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # not a JSON of ours: whole tensor files stay
    for path in directory.iterdir():
        if path.name != keep and TENSOR_NAME.fullmatch(path.name):
            path.unlink(missing_ok=True)
