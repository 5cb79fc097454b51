"""No pickle is ever read (invariant 12), live; test_house.py searches the sources for ways to read one."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import torch
from checkpoint_cases import forge, in_child, loaded_round, refused, save_round


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


def test_inv12_pickle_in_place_of_a_checkpoint_is_refused_unread(tmp_path: Path) -> None:
    marker, data = tmp_path / "pwned", pickle.dumps(Payload(tmp_path / "pwned"))
    torch.save({"a": Payload(marker)}, tmp_path / "torch.pt")
    for content in (data, (tmp_path / "torch.pt").read_bytes()):
        forge(tmp_path / "run", content)
        assert "is not a safetensors file" in refused(tmp_path / "run")
        (tmp_path / "run" / "checkpoint.json").write_bytes(content)
        assert "is damaged or cut short" in refused(tmp_path / "run")
    assert not marker.exists()
    pickle.loads(data)
    assert marker.exists()  # the payload was live


def test_inv12_saving_and_loading_never_enters_the_unpickler(tmp_path: Path) -> None:
    """Python's own audit event for pickle, watched while a checkpoint goes out and in."""

    def watched() -> None:
        seen: list[str] = []
        sys.addaudithook(lambda event, _: seen.append(event) if event.startswith("pickle") else None)
        save_round(tmp_path, 1)
        loaded_round(tmp_path)
        assert seen == []
        pickle.loads(pickle.dumps(Path("x")))
        assert seen  # the hook does hear

    assert in_child(watched) == 0
