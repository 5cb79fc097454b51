"""Whether a process holds a run directory, found out without taking its lock from anyone."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path

from fedmoe_core.simulation.directory.claim import LOCK

LOCKS = Path("/proc/locks")


def in_use(path: Path) -> bool | None:
    """Tell whether a process holds the run directory; None where that cannot be found out.

    Linux lists its locks, those of this container's processes, which touches nothing. A lock that is not in the list
    may be held elsewhere, so it is then tried for with a shared lock, which fails beside the run's own. Held for 20 us,
    it is in the way of a run that starts or resumes in that very moment, and of none that goes on.
    """
    try:
        lock = os.open(path / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        if _listed(os.fstat(lock)):
            return True
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(lock)
    return False


def _listed(facts: os.stat_result) -> bool:
    """Whether the list of locks has this file: ``1: FLOCK  ADVISORY  WRITE 4242 fe:01:1312 0 EOF``."""
    file = f"{os.major(facts.st_dev):02x}:{os.minor(facts.st_dev):02x}:{facts.st_ino}"
    with suppress(OSError):
        return any(line.split()[1:2] == ["FLOCK"] and file in line.split() for line in LOCKS.read_text().splitlines())
    return False
