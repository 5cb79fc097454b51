"""No network at run time (invariant 12): a whole run under an audit hook that forbids every way out."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from tiny_runs import TINY, fedmoe, write_notes

# CPython's own audit events; code in C that opens sockets without Python is out of their sight.
WATCHED = """
import os, runpy, sys

FORBIDDEN = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr",
             "socket.getnameinfo", "socket.sendto", "socket.sendmsg", "socket.bind", "urllib.Request",
             "http.client.connect", "ftplib.connect", "smtplib.connect")

def inside(event, arguments):
    return False

def hook(event, arguments):
    if event in FORBIDDEN and not inside(event, arguments):
        # Past every except clause: no code under test may catch this and go on without the network.
        sys.stderr.write(f"network: {event} {arguments!r}\\n")
        sys.stderr.flush()
        os._exit(97)

sys.addaudithook(hook)
"""
# Packages that ask the kernel for IPv6 when they are imported, or that talk to a process of their own.
WITHIN = """
import os, socket

def inside(event, arguments):
    if event == "socket.connect" and arguments[0].family == socket.AF_UNIX:
        return True
    return event == "socket.bind" and arguments[1] == ("::1", 0)
"""
RUN = "sys.argv[0] = 'fedmoe'\nrunpy.run_module('fedmoe_core.cli', run_name='__main__')\n"


def watched(*words: str | Path, then: str = RUN) -> subprocess.CompletedProcess[str]:
    return fedmoe(*words, prefix=("-c", WATCHED + then))


def test_inv12_a_run_its_resume_and_its_report_open_no_connection(tmp_path: Path) -> None:
    notes, out = write_notes(tmp_path / "notes.jsonl"), tmp_path / "run"
    where = (f"data=jsonl:{notes}", f"out={out}", f"cache={tmp_path / 'cache'}", "watch.sinks=tensorboard,prometheus")
    done = watched("simulate", *TINY, *where, "--quiet")
    assert done.returncode == 0, done.stderr
    assert "network" not in done.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert summary["rounds"] == 1
    page = (out / "report.html").read_text().casefold()  # nor may a browser that opens it go out
    for word in ('src="http', "src='http", 'href="http', "url(http", "@import", "//cdn", "<script src"):
        assert word not in page, word
    (out / "summary.json").unlink()
    done = watched("resume", out, "--quiet")
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "summary.json").read_text())["model_hash"] == summary["model_hash"]
    assert (out / "metrics.prom").is_file()
    assert list((out / "tensorboard").iterdir())
    assert "warning" not in done.stderr


EVERY = """
import json
for words in json.loads(os.environ["COMMANDS"]):
    sys.argv = ["fedmoe", *words]
    try:
        runpy.run_module("fedmoe_core.cli", run_name="__main__")
    except SystemExit as end:
        assert end.code in (0, None), (words, end.code)
"""


def test_inv12_no_command_nor_a_process_that_it_starts_opens_a_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All commands on local data; ranks and the runs of a comparison are processes of their own, watched as well."""
    notes, out = write_notes(tmp_path / "notes.jsonl"), tmp_path / "run"
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(WATCHED)  # Python imports it as it starts
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "hook"))
    words = [*TINY, f"data=jsonl:{notes}", f"cache={tmp_path / 'cache'}"]
    commands: list[list[str]] = [
        ["systems"],
        ["plan", *words],
        ["simulate", "-q", *words, f"out={out}", "ranks=2"],
        ["score", "-q", *words, "--batches", "1"],
        ["compare", "-q", *words, "--systems", "random,fedavg", "--seeds", "0", "--out", str(tmp_path / "compare")],
        ["report", str(out)],
        ["watch", "--once", str(out)],
    ]
    monkeypatch.setenv("COMMANDS", json.dumps(commands))
    done = fedmoe(prefix=("-c", "import os, runpy, sys\n" + EVERY))
    assert done.returncode == 0, done.stderr
    assert "network" not in done.stderr
    assert json.loads((tmp_path / "compare" / "compare.json").read_text())
    # The hook was there: the same way in, with a way out.
    caught = fedmoe(prefix=("-c", "import socket; socket.getaddrinfo('localhost', 80)"))
    assert caught.returncode == 97


@pytest.mark.parametrize("sink", ["wandb", "mlflow"])
def test_inv12_trackers_stay_on_this_machine_until_the_user_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sink: str
) -> None:
    """What Python does; the process that Weights & Biases starts beside it is not Python, and is told to be offline."""
    pytest.importorskip(sink)
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    notes, out = write_notes(tmp_path / "notes.jsonl"), tmp_path / "run"
    where = (f"data=jsonl:{notes}", f"out={out}", f"cache={tmp_path / 'cache'}", f"watch.sinks={sink}")
    done = watched("simulate", *TINY, *where, "--quiet", then=WITHIN + RUN)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    assert (out / {"wandb": "wandb/latest-run", "mlflow": "mlflow.db"}[sink]).exists()


@pytest.mark.parametrize(
    "attempt",
    [
        "import socket; socket.create_connection(('127.0.0.1', 9), timeout=1)",
        "import socket; socket.getaddrinfo('localhost', 80)",
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9/', timeout=1)",
        "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))",
        "try:\n    import socket; socket.getaddrinfo('localhost', 80)\nexcept BaseException:\n    pass",
    ],
)
def test_inv12_the_hook_hears_every_way_out(attempt: str) -> None:
    done = watched(then=attempt)
    assert done.returncode == 97
    assert "network: " in done.stderr
