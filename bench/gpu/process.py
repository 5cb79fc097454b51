"""Parts as processes: each in a session of its own, imported ahead of its turn, ended with everything it started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from bench.common import checkout
from bench.gpu.plan import RUN, Part

TILES = "FEDMOE_TILES"
ROUNDS_OF_KILLS = 5


def end_session(leader: int) -> None:
    """Kill every process of the session that `leader` began, whatever process groups they have made.

    A process that starts while others are killed is found in the next round. Where there is no /proc, the leader's own
    process group is all that is found.
    """
    for _ in range(ROUNDS_OF_KILLS):
        found = [pid for pid in _processes() if _session(pid) == leader]
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if not found:
            break
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def _processes() -> list[int]:
    proc = Path("/proc")
    return [int(entry.name) for entry in proc.iterdir() if entry.name.isdigit()] if proc.exists() else []


def _session(pid: int) -> int | None:
    """Return the session of a process that still runs."""
    try:
        if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return None
        return os.getsid(pid)
    except (OSError, IndexError):
        return None


class Processes:
    """Starts and ends the parts.

    Args:
        words: options that every part gets.
        environment: of every part.
        say: gets each line that a part prints, with the part's name.
    """

    def __init__(self, words: tuple[str, ...], environment: Mapping[str, str], say: Callable[[str, str], None]) -> None:
        self._words, self._environment, self._say = words, dict(environment), say
        self._ahead: dict[str, subprocess.Popen[str]] = {}
        self._running: list[subprocess.Popen[str]] = []

    def run(self, part: Part, seconds: float, following: Part | None) -> int | None:
        """Run a part; its exit code, negative for a signal, None = it was ended after `seconds`.

        `following` is imported meanwhile: a process of torch needs seconds for that.
        """
        process = self._ahead.pop(part.name, None)
        if process is None or process.poll() is not None:
            process = self._start(part)
        self._running.append(process)
        self._tell(process, seconds)
        if following is not None and following.name not in self._ahead:
            self._ahead[following.name] = self._start(following)
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            self._end(process)

    def beside(self, part: Part) -> None:
        """Start a part and do not wait for it; it is ended with the rest."""
        process = self._start(part)
        self._running.append(process)
        self._tell(process, part.seconds)

    def close(self) -> None:
        """End all that still runs."""
        for process in (*self._ahead.values(), *self._running):
            self._end(process)
        self._ahead.clear()

    def _start(self, part: Part) -> subprocess.Popen[str]:
        waits = ("--wait",) if part.module == RUN else ()
        command = checkout.command(part.module, *part.words, *self._words, *waits)
        environment = self._environment if part.tuned else {k: v for k, v in self._environment.items() if k != TILES}
        streams: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(
            command, env=environment, text=True, errors="replace", start_new_session=True, **streams
        )
        threading.Thread(target=self._read, args=(process.stdout, part.name), daemon=True).start()
        return process

    def _read(self, stream: IO[str], name: str) -> None:
        with contextlib.suppress(ValueError):  # closed by the other thread
            for line in stream:
                self._say(name, line.rstrip("\n"))

    def _tell(self, process: subprocess.Popen[str], seconds: float) -> None:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(f"{seconds:.1f}\n")
            process.stdin.close()

    def _end(self, process: subprocess.Popen[str]) -> None:
        end_session(process.pid)
        with contextlib.suppress(subprocess.TimeoutExpired):  # one that hangs in the driver is left behind
            process.wait(2)
        if process in self._running:
            self._running.remove(process)
