"""``fedmoe watch``: once for pipes, following in a terminal, several runs and a comparison's; Ctrl-C ends it well."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from synthetic_run import make_run
from tiny_runs import HOUSE, fedmoe_here

from fedmoe_core.simulation.directory.claim import exclusive

PATHS = (HOUSE, HOUSE / "kernels", HOUSE / "bindings")


class Terminal:
    """``fedmoe watch`` in a terminal of its own."""

    def __init__(self, *words: str | Path) -> None:
        self.master, slave = pty.openpty()
        paths = os.pathsep.join([*map(str, PATHS), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "300", "LINES": "40", "PYTHONPATH": paths}
        command = [sys.executable, "-m", "fedmoe_core.cli", "watch", "--every", "0.1", *map(str, words)]
        streams = {"stdin": slave, "stdout": slave, "stderr": slave}
        # A session whose terminal this is, so that Ctrl-C reaches it as a key.
        self.process = subprocess.Popen(
            [sys.executable, "-c", TAKES_TERMINAL, *command], env=environment, start_new_session=True, **streams
        )
        os.close(slave)
        self.text = ""

    def until(self, shown: Callable[[str], bool]) -> str:
        """Read until the text so far is as asked, or the command has ended."""
        deadline = time.monotonic() + 60
        while not shown(self.text) and time.monotonic() < deadline and self.read():
            pass
        assert shown(self.text), self.text[-2000:]
        return self.text

    def read(self) -> bool:
        """Read what is there; False once the command has ended and all is read."""
        ended = self.process.poll() is not None  # before the last look, so that nothing is left unread
        ready, _, _ = select.select([self.master], [], [], 0.1)
        try:
            self.text += os.read(self.master, 1 << 16).decode("utf-8", "replace") if ready else ""
        except OSError:  # the other end is closed
            return False
        return bool(ready) or not ended

    def end(self) -> int:
        """Read all to the end; the exit status. A command that does not end is told with what it showed last."""
        deadline = time.monotonic() + 60
        while self.read():
            assert time.monotonic() < deadline, f"it goes on: {self.text[-2000:]!r}"
        return self.process.wait(10)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)


TAKES_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


def test_once_is_plain_text_without_a_code(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    done = fedmoe_here("watch", tmp_path / "run", "--once")
    assert done.returncode == 0
    assert "HFedMoE: tiny on stdlib  finished" in done.stdout
    assert "round 8 of 8" in done.stdout
    assert "\x1b" not in done.stdout
    assert fedmoe_here("watch", tmp_path / "run").stdout == done.stdout  # not a terminal either


def test_json_is_what_the_table_shows(tmp_path: Path) -> None:
    make_run(tmp_path / "one")
    (seen,) = json.loads(fedmoe_here("watch", tmp_path / "one", "--json").stdout)
    assert (seen["state"], seen["round"], seen["answers"]) == ("finished", 8, {"ok": 79, "failed": 1})
    assert seen["reasons"]["failed"][0]["reason"] == "loss is NaN at step 3"
    assert len(seen["loss_R"]) == 9


def test_several_runs_and_a_folder_of_a_comparison(tmp_path: Path) -> None:
    for place in ("cmp/runs/hfedmoe/seed-0", "cmp/runs/hfedmoe/seed-1", "alone"):
        make_run(tmp_path / place, rounds=2, clients=4)
    (tmp_path / "report.html").write_text("")
    (tmp_path / "empty").mkdir()
    done = fedmoe_here("watch", *sorted(tmp_path.iterdir()))
    named = [line.split()[0] for line in done.stdout.splitlines()[1:]]
    assert named == ["alone", "cmp/runs/hfedmoe/seed-0", "cmp/runs/hfedmoe/seed-1"]
    assert fedmoe_here("watch", tmp_path / "cmp").stdout.count("finished") == 2
    both = fedmoe_here("watch", tmp_path / "cmp", tmp_path / "cmp" / "runs" / "hfedmoe" / "seed-0")
    assert both.stdout.count("finished") == 2  # a run that is named twice is one


def test_what_is_not_a_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = fedmoe_here("watch", tmp_path / "file")
    assert (done.returncode, done.stderr) == (
        2,
        f"error: {tmp_path / 'file'} is not a directory; give the directory of a run\n",
    )
    done = fedmoe_here("watch", tmp_path / "file", tmp_path / "absent")
    assert done.returncode == 2
    assert "none of 2 paths holds a run" in done.stderr
    done = fedmoe_here("watch", tmp_path / "absent")
    assert done.returncode == 0
    assert "there is no run in" in done.stdout


def test_it_follows_a_run_in_a_terminal_and_leaves_with_it(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with Terminal(path) as terminal:
        follow(terminal, tmp_path, path)


def follow(terminal: Terminal, tmp_path: Path, path: Path) -> None:
    terminal.until(lambda text: "waits for one" in text)
    make_run(tmp_path / "made", clients=4)
    summary, lines = (
        (tmp_path / "made" / "summary.json").read_text(),
        (tmp_path / "made" / "metrics.jsonl").read_bytes(),
    )
    (tmp_path / "made" / "summary.json").unlink()
    kept = lines[: lines.index(b'"round": 5')]
    (tmp_path / "made" / "metrics.jsonl").write_bytes(kept)  # half a line at its end
    with exclusive(tmp_path / "made"):
        (tmp_path / "made").rename(path)
        assert "running" in terminal.until(lambda text: "round 4 of 8" in text)
        (path / "metrics.jsonl").write_bytes(lines)
        terminal.until(lambda text: "round 8 of 8" in text)
    terminal.until(lambda text: "stopped; " in text)
    (tmp_path / "summary.json").write_text(summary)
    (tmp_path / "summary.json").rename(path / "summary.json")  # whole or not there, as a run writes it
    assert terminal.end() == 0
    last = terminal.text[terminal.text.rindex("HFedMoE") :]
    assert "finished" in last
    assert last.endswith("\x1b[?25h")  # the cursor is back
    assert "\x1b[?1049" not in terminal.text  # what was on the screen stays there


def test_ctrl_c_ends_it_with_0_and_a_clean_terminal(tmp_path: Path) -> None:
    make_run(tmp_path / "run", clients=4)
    (tmp_path / "run" / "summary.json").unlink()
    with Terminal(tmp_path / "run", tmp_path / "other") as terminal:
        terminal.until(lambda text: "stopped" in text)
        os.write(terminal.master, b"\x03")
        assert terminal.end() == 0
    assert terminal.text.endswith("\x1b[?25h")
    assert "Traceback" not in terminal.text
    assert "Aborted" not in terminal.text


def test_it_imports_no_torch(tmp_path: Path) -> None:
    make_run(tmp_path / "run", clients=4)
    code = (
        "import sys; from fedmoe_core.cli import main; sys.argv = ['fedmoe', 'watch', sys.argv[1]]\n"
        "try:\n    main.main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert 'torch' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, PATHS), os.environ.get("PYTHONPATH", "")])}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], check=True, env=environment, timeout=60)
