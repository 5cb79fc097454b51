"""Damaged, foreign and hostile checkpoints are refused in one sentence (invariant 11)."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from checkpoint_cases import forge, loaded_round, refused, save_round
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedmoe_core.simulation.directory.checkpoint import load_checkpoint

# Invariant 11: damaged, foreign and hostile files.


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_inv11_cut_or_flipped_files_are_refused(tmp_path: Path, data: st.DataObject) -> None:
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    save_round(tmp_path / "run", 5)
    path = data.draw(st.sampled_from(sorted((tmp_path / "run").iterdir())))
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans(), label="cut"):
        path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
        assert path.name in refused(tmp_path / "run")
        return
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    # A flip in JSON may spell the same value in another way ("e" and "E"); anything else must be noticed.
    if path.suffix == ".json" and _same_json(content, tmp_path / "run"):
        assert loaded_round(tmp_path / "run") == 5
    else:
        assert path.name in refused(tmp_path / "run")


def _same_json(content: bytes, directory: Path) -> bool:
    flipped = json.loads(content) if _is_json(content) else None
    save_round(directory / "again", 5)
    same = flipped == json.loads((directory / "again" / "checkpoint.json").read_bytes())
    shutil.rmtree(directory / "again")
    return same


def _is_json(content: bytes) -> bool:
    try:
        json.loads(content)
    except ValueError:
        return False
    return True


def safetensors_bytes(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def float_entry(start: int, stop: int, shape: list[int]) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, stop]}


HOSTILE = {
    "empty": b"",
    "text": b"hello, world, this is no tensor file",
    "header of 8 EiB": safetensors_bytes({}, length=2**63 - 1),
    "header of 2^64 - 1": safetensors_bytes({}, length=2**64 - 1),
    "header of 200 MB": safetensors_bytes({}, length=200 << 20),
    "header longer than the file": safetensors_bytes({}, length=100),
    "header is no JSON": safetensors_bytes(b"{{{{"),
    "header is a list": safetensors_bytes([1, 2]),
    "deep header": safetensors_bytes(b"[" * 100_000),
    "offsets past the end": safetensors_bytes({"a": float_entry(0, 4000, [1000])}, b"\0" * 4),
    "offsets backwards": safetensors_bytes({"a": float_entry(4, 0, [1])}, b"\0" * 4),
    "shape larger than the data": safetensors_bytes({"a": float_entry(0, 4, [1000])}, b"\0" * 4),
    "shape that overflows": safetensors_bytes({"a": float_entry(0, 0, [2**32, 2**32])}),
    "overlap": safetensors_bytes({"a": float_entry(0, 8, [2]), "b": float_entry(4, 12, [2])}, b"\0" * 12),
    "hole": safetensors_bytes({"a": float_entry(0, 4, [1]), "b": float_entry(8, 12, [1])}, b"\0" * 12),
    "bytes after the end": safetensors_bytes({"a": float_entry(0, 4, [1])}, b"\0" * 400),
    "unknown dtype": safetensors_bytes({"a": {"dtype": "PY", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_inv11_hostile_tensor_file_is_refused(tmp_path: Path, name: str) -> None:
    forge(tmp_path, HOSTILE[name])
    assert "is not a safetensors file" in refused(tmp_path)


def test_inv11_the_forger_can_also_write_a_good_file(tmp_path: Path) -> None:
    """The control: what the hostile cases change is what they are refused for."""
    forge(tmp_path, safetensors_bytes({"a": float_entry(0, 4, [1])}, struct.pack("<f", 2.5)))
    assert load_checkpoint(tmp_path).tensors["a"].tolist() == [2.5]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is damaged or cut short"),
        (b"\xff\xfe\x00", "is damaged or cut short"),
        (b"[" * 200_000, "is damaged or cut short"),
        (b"[]", "is not a fedmoe checkpoint"),
        (b'{"epoch": 3}', "is not a fedmoe checkpoint"),
        (b'{"format": "fedmoe-checkpoint", "format_version": 99}', "format version 99"),
        (b'{"format": "fedmoe-checkpoint", "format_version": 3}', "does not match its digest"),
    ],
)
def test_inv11_foreign_json_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "checkpoint.json").write_bytes(content)
    assert words in refused(tmp_path)


def test_inv11_json_with_missing_or_wrong_parts_is_refused(tmp_path: Path) -> None:
    good = safetensors_bytes({})
    for name in ("meta", "config", "versions", "tensors"):
        forge(tmp_path, good, **{name: [1]})
        assert "lacks one of" in refused(tmp_path)
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(good)
    for name in (str(outside), "../outside.safetensors", "checkpoint.json", None, 3, "state-0.safetensors"):
        forge(tmp_path / "run", good, tensors={"file": name, "bytes": len(good)})
        assert "which is not one of ours" in refused(tmp_path / "run")
    forge(tmp_path, good, tensors={"file": "state-0123456789abcdef.safetensors"})
    assert "bytes instead of None" in refused(tmp_path)
    forge(tmp_path, good)
    only = tmp_path / "state-0123456789abcdef.safetensors"
    only.unlink()
    assert "cannot be read (No such file or directory)" in refused(tmp_path)
    only.mkdir()
    assert "is a folder, and fedmoe writes a file there" in refused(tmp_path)


def test_nothing_there_is_one_sentence(tmp_path: Path) -> None:
    assert "there is no checkpoint to resume" in refused(tmp_path / "nowhere")
    (tmp_path / "checkpoint.json").mkdir()
    assert "is a folder, and fedmoe writes a file there" in refused(tmp_path)
    (tmp_path / "checkpoint.json").rmdir()
    os.mkfifo(tmp_path / "checkpoint.json")  # reading it would wait for a writer
    assert "is a pipe" in refused(tmp_path)
