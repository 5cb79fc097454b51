"""Ties child processes to the one that started them: when that one ends, however it ends, they end too."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from threading import Thread
from threading import enumerate as threads

BY_NUMBER = "parent"  # name of the thread that watches a parent without a lifeline
LOOK = 0.5  # seconds between its looks
LIFELINE = "FEDMOE_LIFELINE"  # number of the descriptor that a child watches


@dataclass(frozen=True)
class Lifeline:
    """What ``subprocess.Popen`` needs so that the child can watch this process.

    Attributes:
        pass_fds: the reading end of a pipe. The writing end stays here and closes with this process.
        environment: tells the child which descriptor that is.
    """

    pass_fds: tuple[int]
    environment: Mapping[str, str]


@contextmanager
def lifeline() -> Iterator[Lifeline]:
    """Hold a pipe that children watch until the block ends; a child that still runs then ends itself.

    A pipe and not a signal of the kernel's (Linux has PR_SET_PDEATHSIG): it works on every POSIX system, and the child
    gets to run a last word. Even ``kill -9`` closes it.
    """
    watched, held = os.pipe()  # neither end is inherited unless pass_fds names it
    try:
        yield Lifeline((watched,), {LIFELINE: str(watched)})
    finally:
        os.close(watched)
        os.close(held)


def follow(last: Callable[[], None]) -> None:
    """End this process, status 1, as soon as the one that started it with a lifeline is gone; at most one watch.

    Args:
        last: called before the end, from another thread than the main one.
    """
    number = os.environ.pop(LIFELINE, "")  # children of this process are not the launcher's
    if not number.isdecimal():
        return
    with suppress(OSError):
        if stat.S_ISFIFO(os.fstat(int(number)).st_mode):
            Thread(target=_watch, args=(int(number), last), name="lifeline", daemon=True).start()


def follow_by_number(last: Callable[[], None]) -> None:
    """End this process as ``follow`` does, where the parent is another program's: by its number, which then changes."""
    if not any(thread.name == BY_NUMBER for thread in threads()):
        Thread(target=_look, args=(os.getppid(), last), name=BY_NUMBER, daemon=True).start()


def _look(parent: int, last: Callable[[], None]) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK)
    try:
        last()
    finally:
        os._exit(1)


def _watch(descriptor: int, last: Callable[[], None]) -> None:
    try:
        while os.read(descriptor, 1):
            pass
    except OSError:
        return  # the descriptor was closed in this process; that says nothing about the other one
    try:
        last()
    finally:
        os._exit(1)  # the main thread may sit in a collective that no exception reaches
