"""Checkpoints, forgeries and short-lived processes for the tests of checkpoints."""

from __future__ import annotations

import hashlib
import json
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedmoe_core.simulation.directory import checkpoint
from fedmoe_core.simulation.directory.checkpoint import load_checkpoint, save_checkpoint

CONFIG = {"algorithm": "hfedmoe", "train.lr": 0.002, "train.clip": 1.0, "budgets": ["experts=25%", "experts=50%"]}


def tensors_of(round_: int, size: int = 64) -> dict[str, Tensor]:
    return {"moe.0.w_in": torch.full((size,), float(round_)), "round": torch.tensor(round_)}


def save_round(directory: Path, round_: int, size: int = 64) -> None:
    save_checkpoint(directory, tensors_of(round_, size), {"round": round_}, CONFIG)


def loaded_round(directory: Path, size: int = 64) -> int:
    """The round of the checkpoint, after proving that tensors and JSON belong to it."""
    loaded = load_checkpoint(directory, expected_fingerprint=CONFIG)
    round_ = int(loaded.meta["round"])
    want = tensors_of(round_, size)
    assert loaded.tensors.keys() == want.keys()
    assert all(torch.equal(loaded.tensors[key], want[key]) for key in want)
    return round_


def in_child(work: Callable[[], Any]) -> int:
    """Run ``work`` in a forked process; its exit status, -9 when killed. A fork spares importing torch again."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def refused(directory: Path, **options: Any) -> str:
    """The one sentence with which a checkpoint is refused."""
    with pytest.raises(ValueError) as caught:
        load_checkpoint(directory, **options)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    return str(caught.value)


def only_tensor_file(directory: Path) -> Path:
    (file,) = directory.glob("*.safetensors")
    return file


def forge(directory: Path, data: bytes, name: str = "state-0123456789abcdef.safetensors", **changes: Any) -> None:
    """A checkpoint whose digests are all right, made by someone who knows the format."""
    directory.mkdir(exist_ok=True)
    (directory / name).write_bytes(data)
    entry = {"file": name, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    body = {"meta": {}, "config": {}, "versions": {}, "tensors": entry, "format": checkpoint.FORMAT}
    body |= {"format_version": checkpoint.FORMAT_VERSION, **changes}
    body["digest"] = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (directory / "checkpoint.json").write_text(json.dumps(body))
