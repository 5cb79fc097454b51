"""Halves of files: with their writer they go, killed writers' go with the next, and those of living ones stay."""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedmoe_core.base import halves
from fedmoe_core.base.files import ensure_writable, replacing, write_whole
from fedmoe_core.base.halves import beside, sweep, whose


def killed(work: Callable[[], object]) -> None:
    """Do ``work`` in a child, which has to kill itself on the way."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def write_half(path: Path) -> None:
    """As safetensors does: its own file beside the one that was asked for, and then the kill."""
    with replacing(path) as partial:
        partial.with_name(".tmpAb3dEf").write_bytes(b"half")
        die()


def test_what_a_killed_writer_and_its_library_left_goes_with_the_next_writing(tmp_path: Path) -> None:
    path, other = tmp_path / "state.safetensors", tmp_path / "summary.json"
    for target in (path, path, other):
        killed(lambda target=target: write_half(target))  # type: ignore[misc]
    left = list(tmp_path.iterdir())
    assert sorted(map(whose, left)) == [path.name, other.name], "the second one swept what the first one left"
    assert {stat.S_IMODE(half.stat().st_mode) for half in left} == {0o700}, "a secret is nobody else's from the start"
    with replacing(path) as partial:
        save_file({"a": torch.arange(3)}, partial)
    assert load_file(path)["a"].tolist() == [0, 1, 2]
    assert sorted(entry.name for entry in tmp_path.iterdir() if not whose(entry)) == [path.name]
    assert [whose(entry) for entry in tmp_path.iterdir() if whose(entry)] == [other.name], "each file sweeps its own"
    write_whole(other, "{}")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [path.name, other.name]


def test_a_probe_that_was_killed_leaves_nothing_that_the_next_one_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "write_bytes", die)
    killed(lambda: ensure_writable(tmp_path))
    monkeypatch.undo()
    assert [whose(entry) for entry in tmp_path.iterdir()] == ["probe"]
    ensure_writable(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_half_of_a_living_process_or_of_another_machine_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state"
    with beside(path) as mine:
        name = mine.name
    here = name.split(".")[2].rsplit("-", 2)[0]
    parent = name.replace(f"-{os.getpid()}-", f"-{os.getppid()}-")
    far = name.replace(here, "node-7-4026531836")
    for half in (parent, far):
        (tmp_path / half).mkdir()
        (tmp_path / half / "state").write_text("half")
    killed(die)
    write_whole(path, "whole")
    assert {entry.name for entry in tmp_path.iterdir()} == {"state", parent, far}
    monkeypatch.setattr(halves, "AGE", -1.0)
    sweep(tmp_path, "state")
    assert {entry.name for entry in tmp_path.iterdir()} == {"state", parent}, "one of another machine ages"
    sweep(tmp_path, "state", alone=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["state"]


def test_a_link_or_a_file_with_the_name_of_a_half_stays(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "kept").write_text("kept")
    (tmp_path / "run").mkdir()
    link, file = (tmp_path / "run" / f".state.vm-{number}-ab.half" for number in (1, 2))
    link.symlink_to(tmp_path / "precious")
    file.write_text("theirs")
    assert whose(link) == whose(file) == "state"
    sweep(tmp_path / "run", "state", alone=True)
    assert (link.is_symlink(), file.read_text(), (tmp_path / "precious" / "kept").read_text()) == (
        True,
        "theirs",
        "kept",
    )
    sweep(tmp_path / "nowhere", "state")
    sweep(file, "state")


@pytest.mark.parametrize("name", ["state", ".state.half", ".state.vm-x-ab.half", "state.vm-1-ab.half", ".vm-1-ab.half"])
def test_other_names_are_of_no_half(name: str) -> None:
    assert whose(Path(name)) == ""
