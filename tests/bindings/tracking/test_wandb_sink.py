"""The wandb sink: an offline run of Weights & Biases with the run's id, which no step enters twice."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("wandb")  # 70 MB with what it needs: make trackers

from own_sinks import stopped_and_resumed, watched
from tiny_runs import write_notes
from wandb.proto import wandb_internal_pb2

from fedmoe_core.simulation import run as simulate
from fedmoe_core.simulation.observer import NullObserver

BLOCK, WHOLE, LAST = 1 << 15, 1, 4  # bytes; kinds of a piece


@pytest.fixture(autouse=True)
def untold(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's environment says nothing about Weights & Biases."""
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_NAME", "WANDB_ERROR_REPORTING", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)


def records(folder: Path) -> list[Any]:
    """The records of an offline run: LevelDB's log format, blocks of 32 KiB, after a header of 7 bytes."""
    (file,) = folder.glob("run-*.wandb")
    data, place, part, found = file.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        if (room := BLOCK - place % BLOCK) < 7:
            place += room
            continue
        size, kind = struct.unpack_from("<HB", data, place + 4)  # after the checksum
        part += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (WHOLE, LAST):
            found.append(wandb_internal_pb2.Record.FromString(part))
            part = b""
    return found


def history(found: list[Any]) -> list[dict[str, Any]]:
    rows = [record.history.item for record in found if record.WhichOneof("record_type") == "history"]
    return [{(i.key or ".".join(i.nested_key)): json.loads(i.value_json) for i in row} for row in rows]


def test_a_resumed_run_is_two_offline_parts_of_one_id_without_a_doubled_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulate, "HURRY", 60.0)  # its process takes seconds to start on a busy machine
    out = tmp_path / "run"
    config = watched(write_notes(tmp_path / "notes.jsonl"), out, "wandb")
    summary = stopped_and_resumed(config, after=1)
    marker = json.loads((out / "fedmoe-run.json").read_text())
    parts = [records(folder) for folder in sorted((out / "wandb").glob(f"offline-run-*-{marker['id']}"))]
    steps = [[row["_step"] for row in history(part)] for part in parts]
    assert sorted(steps) == [[0, 1], [2, 3]]
    rows = sorted((row for part in parts for row in history(part)), key=lambda row: row["_step"])
    assert rows[-1]["loss"] == summary["loss_after"]
    assert "tier experts=25%/loss" in rows[-1]
    assert rows[-1]["importance/layer 0._type"] == "histogram"
    (told,) = [record.run for record in parts[0] if record.WhichOneof("record_type") == "run"][:1]
    settings = {item.key: json.loads(item.value_json) for item in told.config.update}
    assert (settings["train.lr"], settings["algorithm"]) == (2e-3, "hfedmoe")


def test_the_users_mode_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    out = tmp_path / "run"
    simulate.run(watched(write_notes(tmp_path / "notes.jsonl"), out, "wandb"), observer=NullObserver())
    assert list(out.glob("wandb/offline-run-*")) == []
