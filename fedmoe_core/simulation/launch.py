"""Starts the ranks of one run on this machine and brings back the first failure as one sentence.

The ranks meet through a file in a private directory and talk over the loopback interface. torchrun would meet through
its c10d rendezvous, which listens on every interface and unpickles what any process stores there.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from tempfile import TemporaryDirectory
from threading import Thread, current_thread, main_thread
from typing import Any

from fedmoe_core.base.lifeline import follow, follow_by_number, lifeline

LAUNCHED = "FEDMOE_LAUNCHED"  # the directory that ranks of this module share; they leave speaking to their parent
ATTEMPT = "TORCHELASTIC_RESTART_COUNT"  # how often torchrun has started this run again
REQUEUED = "SLURM_RESTART_COUNT"  # how often Slurm has
COMMAND = ("-m", "fedmoe_core.cli")
PEER_LOST = 3  # exit status of a rank that ended only because another one did
HUNG = 4  # exit status of a process in which a client hangs where nothing can interrupt it
SETTLE = 5.0  # seconds after the first failure in which the others may find out by themselves
PATIENCE = 10.0  # seconds from the request to stop until a rank is killed


class RankError(Exception):
    """A rank ended with an error; ``code`` is its exit status (128 + the number of a signal), the text its sentence."""

    def __init__(self, sentence: str, code: int) -> None:
        super().__init__(sentence)
        self.code = code


class PeerLostError(Exception):
    """Another rank ended, or cannot be reached, while this one waited for it."""


def rank() -> int:
    """Return this process's rank; 0 outside a launcher."""
    return int(os.environ.get("RANK", "0"))


def launched() -> bool:
    """Tell whether this process is a rank, no matter which launcher started it."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def restarted() -> bool:
    """Tell whether a launcher started this command before and starts it again after a failure."""
    return any(os.environ.get(name, "0").strip("0 ") for name in (ATTEMPT, REQUEUED))


def speaks() -> bool:
    """Tell whether this process tells the user how it ended: rank 0, unless a parent of ours waits for it."""
    return rank() == 0 and LAUNCHED not in os.environ


def meeting_place() -> Path | None:
    """Return the file through which the ranks of ``run_ranks`` find each other; None under another launcher."""
    shared = os.environ.get(LAUNCHED)
    return Path(shared) / "store" if shared else None


def check_world(ranks: int) -> None:
    """Refuse a configuration that disagrees with the torchrun around it.

    Raises:
        ValueError: WORLD_SIZE and ``ranks`` differ.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if launched() and world != ranks:
        raise ValueError(
            f"ranks={ranks} but torchrun started {world}; set ranks={world}, or start fedmoe without torchrun"
        )


def run_ranks(arguments: Sequence[str], *, ranks: int, threads: int, program: Sequence[str] = COMMAND) -> None:
    """Run ``python PROGRAM ARGUMENTS`` as ``ranks`` processes to the end; none of them outlives this one.

    Raises:
        RankError: a rank ended with a non-zero status or by a signal.
        KeyboardInterrupt: the user or the system stopped the run.
    """
    command = [sys.executable, "-u", *program, *arguments]
    with TemporaryDirectory(prefix="fedmoe-ranks-") as shared, lifeline() as line, stoppable():
        common = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": str(threads)}
        common |= {LAUNCHED: shared, **line.environment, **_loopback()}
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for number in range(ranks):
                own = {"RANK": str(number), "LOCAL_RANK": str(number)}
                # A session of its own: Ctrl-C in the terminal reaches the launcher alone, which then stops all ranks.
                streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "pass_fds": line.pass_fds}
                environment = {**os.environ, **common, **own}
                processes.append(subprocess.Popen(command, env=environment, start_new_session=True, **streams))
            failure = _first_failure(processes)
        finally:
            stop(processes)
        if failure is not None:
            raise _error(*failure, Path(shared))


def tell_parent(sentence: str) -> bool:
    """Hand an error to the process that started this rank; False without one: the rank must say it itself."""
    shared = os.environ.get(LAUNCHED)
    if not shared:
        return False
    try:
        _words(Path(shared), rank()).write_text(sentence, encoding="utf-8", errors="backslashreplace")
    except OSError:  # a cleaner of old temporary files may have removed the directory of a run of many days
        return False
    return True


def follow_parent() -> None:
    """End with the launcher or the comparison that started this process, should that be killed."""
    follow(_last_words)
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun holds no lifeline
        follow_by_number(_last_words)


def _last_words() -> None:
    if shared := os.environ.get(LAUNCHED):  # the launcher could not remove it
        shutil.rmtree(shared, ignore_errors=True)
    if rank() == 0:
        with suppress(OSError):
            os.write(2, b"error: the process that started this run is gone, so the run stops; resume it\n")


@contextmanager
def stoppable() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the block as Ctrl-C does, unless this process was told to ignore them (nohup)."""
    before = {}
    try:
        for number in (signal.SIGTERM, signal.SIGHUP) if current_thread() is main_thread() else ():
            if signal.getsignal(number) not in (signal.SIG_IGN, None):  # None: not Python's, so it cannot be put back
                before[number] = signal.signal(number, signal.default_int_handler)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask those that still run to stop, wait, and kill those that do not; a second Ctrl-C ends the waiting."""
    living = [process for process in processes if process.poll() is None]
    for process in living:
        process.terminate()
    deadline = time.monotonic() + PATIENCE
    with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
        for process in living:
            process.wait(max(0.0, deadline - time.monotonic()))
    for process in living:
        process.kill()
    for process in living:
        process.wait()


def _loopback() -> dict[str, str]:
    """Variables that keep the sockets of gloo and NCCL on the loopback interface (NCCL: unconfirmed on a GPU)."""
    names = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if not names:
        raise OSError("this machine has no loopback interface (lo), over which ranks would talk; use ranks=1")
    return {"GLOO_SOCKET_IFNAME": names[0], "NCCL_SOCKET_IFNAME": names[0]}


def _first_failure(processes: Sequence[subprocess.Popen[bytes]]) -> tuple[int, int] | None:
    """Wait until all have ended well (None), or until one failed: its rank and status, the cause before the effects."""
    ended: SimpleQueue[tuple[int, int]] = SimpleQueue()
    for number, process in enumerate(processes):
        Thread(target=_report_end, args=(number, process, ended), daemon=True).start()
    failed: list[tuple[int, int]] = []
    deadline = float("inf")
    for _ in processes:
        try:
            end = ended.get(timeout=max(0.0, deadline - time.monotonic()) if failed else None)
        except Empty:
            break
        if end[1]:
            deadline = min(deadline, time.monotonic() + SETTLE)
            failed.append(end)
    return next((end for end in failed if end[1] != PEER_LOST), failed[0] if failed else None)


def _report_end(number: int, process: subprocess.Popen[bytes], ended: SimpleQueue[tuple[int, int]]) -> None:
    ended.put((number, process.wait()))


def _error(number: int, status: int, shared: Path) -> RankError:
    if status < 0:
        name = signal.Signals(-status).name
        cause = ", which the system sends when memory runs out" if name == "SIGKILL" else ""
        return RankError(f"rank {number} was ended by {name}{cause}", 128 - status)
    words = _words(shared, number)
    if words.is_file():
        return RankError(words.read_text("utf-8", "replace"), status)
    return RankError(f"rank {number} ended with status {status}; its own words are above", status)


def _words(shared: Path, number: int) -> Path:
    """The file in which a rank leaves its one sentence."""
    return shared / f"rank-{number}.txt"
