"""No network at run time (invariant 12): a whole run under an audit hook that forbids every way out."""

from __future__ import annotations

import json
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

def hook(event, arguments):
    if event in FORBIDDEN:
        # Past every except clause: no code under test may catch this and go on without the network.
        sys.stderr.write(f"network: {event} {arguments!r}\\n")
        sys.stderr.flush()
        os._exit(97)

sys.addaudithook(hook)
"""
RUN = "sys.argv[0] = 'fedmoe'\nrunpy.run_module('fedmoe_core.cli', run_name='__main__')\n"


def watched(*words: str | Path, then: str = RUN) -> subprocess.CompletedProcess[str]:
    return fedmoe(*words, prefix=("-c", WATCHED + then))


def test_inv12_a_run_its_resume_and_its_report_open_no_connection(tmp_path: Path) -> None:
    notes, out = write_notes(tmp_path / "notes.jsonl"), tmp_path / "run"
    where = (f"data=jsonl:{notes}", f"out={out}", f"cache={tmp_path / 'cache'}")
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
