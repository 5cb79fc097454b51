"""The directory of an export is ours to replace only when its marker says so, and whole or not there."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fedmoe_core.exporting.place import MARKER, placing, read_marker, refuse_place, write_marker


def put(out: Path, text: str, *, force: bool = False) -> None:
    with placing(out, force=force) as folder:
        (folder / "base").mkdir()
        (folder / "base" / "config.json").write_text(text)
        (folder / "model.bin").write_text(text)
        (folder / "model.bin").chmod(0o600)
        write_marker(folder, {"client": 3})


def test_an_export_is_whole_readable_and_says_what_it_holds(tmp_path):
    out = tmp_path / "not" / "yet" / "out"
    put(out, "one")
    facts = read_marker(out)
    assert facts is not None
    assert facts["client"] == 3
    assert facts["files"] == {"base/config.json": 3, "model.bin": 3}
    assert sorted(path.name for path in out.parent.iterdir()) == ["out"]
    assert stat.S_IMODE((out / "model.bin").stat().st_mode) == stat.S_IMODE(out.stat().st_mode) & 0o666
    (tmp_path / "empty").mkdir()
    put(tmp_path / "empty", "two")
    assert (tmp_path / "empty" / "model.bin").read_text() == "two"


def test_an_export_is_replaced_on_demand_alone(tmp_path):
    out = tmp_path / "out"
    put(out, "one")
    with pytest.raises(ValueError, match=r"out already holds an export; replace it with --force"):
        put(out, "two")
    assert (out / "model.bin").read_text() == "one"
    put(out, "two", force=True)
    assert (out / "model.bin").read_text() == "two"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_what_is_not_an_export_stays_whatever_is_said(tmp_path):
    cases = {name: tmp_path / name for name in ("file", "link", "run", "edited", "more")}
    cases["file"].write_text("mine")
    cases["link"].symlink_to(tmp_path)
    cases["run"].mkdir()
    (cases["run"] / "config.toml").write_text("")
    put(cases["edited"], "one")
    body = json.loads((cases["edited"] / MARKER).read_text())
    (cases["edited"] / MARKER).write_text(json.dumps({**body, "files": {**body["files"], "mine": 1}}))
    put(cases["more"], "one")
    (cases["more"] / "base" / "mine").write_text("")
    says = {
        "file": "is a file; choose",
        "link": "is a symbolic link; choose",
        "run": "is not empty and is not an export",
        "edited": "is not empty and is not an export",
        "more": "more/base/mine is not of the export, and --force would remove it; move it away",
    }
    for name, path in cases.items():
        with pytest.raises(ValueError, match=says[name]):
            refuse_place(path, force=True)
        with pytest.raises(ValueError, match=says[name]):
            put(path, "two", force=True)
    assert (cases["edited"] / "model.bin").read_text() == "one"


def test_what_fails_midway_leaves_what_was_there(tmp_path, monkeypatch):
    out = tmp_path / "out"

    def fail(error: Exception) -> None:
        with placing(out, force=False) as folder:
            (folder / "model.bin").write_text("half")
            raise error

    with pytest.raises(KeyError):
        fail(KeyError())
    with pytest.raises(OSError, match=r"out could not be written \(No space left on device\); look whether"):
        fail(OSError(28, os.strerror(28)))
    assert list(tmp_path.iterdir()) == []
    put(out, "one")
    rename = Path.rename

    def failing(self, target):
        if Path(target) == out and self.name == "out" and self.parent.name.endswith(".half"):
            raise OSError(5, "broken")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="broken"):
        put(out, "two", force=True)
    assert (out / "model.bin").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


KILLED = """
import os, signal, sys
from pathlib import Path
from fedmoe_core.exporting.place import placing
with placing(Path(sys.argv[1]), force=True) as folder:
    (folder / "model.bin").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_leaves_the_old_export_and_the_next_one_sweeps_up(tmp_path):
    out = tmp_path / "out"
    put(out, "one")
    done = subprocess.run([sys.executable, "-c", KILLED, str(out)], timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert (out / "model.bin").read_text() == "one"
    assert len(list(tmp_path.iterdir())) == 2
    put(out, "two", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "model.bin").read_text() == "two"
