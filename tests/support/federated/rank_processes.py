"""The processes of a run in a test: started so that they hear signals, found below their launcher, awaited."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path


def descendants(parent: int) -> list[int]:
    """Processes below ``parent``, itself included."""
    below: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            below.setdefault(int(fields[1]), []).append(int(entry.name))
    found = [parent]
    for process in found:
        found += below.get(process, [])
    return found


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def popen(*words: str, env: dict[str, str]) -> subprocess.Popen[str]:
    command, pipe = [sys.executable, *words], subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env, preexec_fn=hearing)


def hearing() -> None:
    """Listen to the signals of a terminal again, which these tests inherit as ignored under nohup or in a job of CI."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def rank_of(process: int) -> int:
    variables = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    return int(next(value for name, _, value in (v.partition(b"=") for v in variables) if name == b"RANK"))


def ended(processes: list[int]) -> bool:
    deadline = time.monotonic() + 20
    while any(map(alive, processes)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(alive, processes))
