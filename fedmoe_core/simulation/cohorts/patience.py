"""How long the server waits for simulated clients: then they count as failed, and a process that hangs is ended."""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread, current_thread, main_thread

from fedmoe_core.client.failures import ClientTimeoutError
from fedmoe_core.simulation import launch

AGAIN = 1.0  # seconds between alarms, should the first be swallowed
# Alarms reach Python code, and operators of torch as soon as they return. A call that does not return within so much
# more time never will.
GRACE = 10.0


@contextmanager
def patience(seconds: float, clients: str, *, grace: float = GRACE) -> Iterator[None]:
    """Wait ``seconds`` for the block, which trains ``clients``; 0 waits as long as it takes.

    The time is that of the wall clock, so what it ends depends on the machine, and so do the bits of such a run.

    Args:
        seconds: for all of them together.
        clients: who, in words.
        grace: seconds after which a block that no alarm reaches ends the process, with exit status ``launch.HUNG``. One
            that also keeps Python's lock, so that no other thread runs, is ended after as much time again: its stack
            is printed, and the exit status is 1. It is faulthandler's one timer, so another use of that ends.

    Raises:
        ClientTimeoutError: the time is up; from wherever the block is.
    """
    if not seconds or not hasattr(signal, "setitimer") or current_thread() is not main_thread():
        yield
        return
    waited = f"waited {seconds:g} s for {clients} (train.timeout)"

    def alarm(*_: object) -> None:
        raise ClientTimeoutError(waited)

    over, began = Event(), time.monotonic()
    before = signal.signal(signal.SIGALRM, alarm)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)
    Thread(target=_watch, args=(over, seconds + grace, waited), name="patience", daemon=True).start()
    with suppress(OSError):  # no stderr; its thread is one of C, which needs no lock
        faulthandler.dump_traceback_later(seconds + 2 * grace, exit=True, file=2)
    try:
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:  # once more: an alarm may have come in the line above
        signal.setitimer(signal.ITIMER_REAL, 0)
        over.set()
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)
        if left:  # of a timer that was there
            signal.setitimer(signal.ITIMER_REAL, max(0.001, left - (time.monotonic() - began)), interval)


def _watch(over: Event, seconds: float, waited: str) -> None:
    if over.wait(seconds):
        return
    sentence = f"{waited}, which hangs where no alarm reaches it; the run stops, with all rounds before this one saved"
    if not launch.tell_parent(sentence):
        os.write(2, f"error: {sentence}\n".encode())
    os._exit(launch.HUNG)
