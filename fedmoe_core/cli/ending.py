"""How a command ends, whatever stops it: in one sentence and with an exit code."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import typer

from fedmoe_core.base.say import say
from fedmoe_core.simulation import launch


@dataclass
class Ending:
    """Where a stopped command could go on; set once the command knows it.

    Attributes:
        run_dir: of the run, if it is one.
        again: how to continue where it is not a single run.
    """

    run_dir: Path | None = None
    again: str = ""

    def stopped(self) -> str:
        """Say how to go on after an interruption."""
        if self.again:
            return f"stopped; go on with: {self.again}"
        if self.resumable():
            under = " (under torchrun again)" if launch.launched() else ""
            return f"stopped; go on with: fedmoe resume {self.run_dir}{under}"
        return "stopped before the first checkpoint; there is nothing to resume yet, start again"

    def resumable(self) -> bool:
        """Tell whether there is a checkpoint to go on from."""
        saved = self.run_dir / "checkpoint" if self.run_dir else None
        return saved is not None and saved.is_dir() and any(saved.iterdir())


@contextmanager
def interruptions(ending: Ending) -> Iterator[None]:
    """Turn Ctrl-C, SIGTERM and SIGHUP into a hint and exit code 130.

    ``errors`` belongs inside it, in the same ``with``. A lost rank and the launcher's SIGTERM come together: while an
    error is on its way out of a run, which may take milliseconds to fall apart, the signal interrupts whatever comes
    next, ``errors`` included, and that has to be told too.
    """
    launch.follow_parent()
    with launch.stoppable():
        try:
            yield
        except KeyboardInterrupt:
            if launch.speaks():
                say(ending.stopped(), err=True)
            raise typer.Exit(130) from None


@contextmanager
def errors(ending: Ending, *, debug: bool) -> Iterator[None]:
    """Turn errors that a user can mend into one sentence and exit code 2, and those of ranks into their own codes."""
    try:
        yield
    except launch.RankError as error:
        if error.code == 130:
            say(ending.stopped(), err=True)
        else:
            unfinished = error.code > 128 or error.code == launch.PEER_LOST
            hint = f"; go on with: fedmoe resume {ending.run_dir}" if unfinished and ending.resumable() else ""
            say(f"error: {error}{hint}", err=True)
        raise typer.Exit(error.code) from None
    except launch.PeerLostError as error:
        if debug:
            raise
        fail(str(error), launch.PEER_LOST)
    except (ValueError, OSError) as error:
        if debug:
            raise
        fail(_sentence(error))


def fail(sentence: str, code: int = 2) -> NoReturn:
    """End with a sentence, which the process that started this one says instead, where there is one."""
    if not launch.tell_parent(sentence):
        say(f"error: {sentence}", err=True)
    raise typer.Exit(code)


def _sentence(error: Exception) -> str:
    """One line without a traceback; an operating-system error also gets the path and what to do."""
    if not (isinstance(error, OSError) and error.strerror):
        return " ".join(str(error).split()) or type(error).__name__
    remedies = {
        errno.EACCES: "choose another out=DIRECTORY or change its permissions",
        errno.EPERM: "choose another out=DIRECTORY or change its permissions",
        errno.EROFS: "choose an out=DIRECTORY that can be written",
        errno.ENOSPC: "free some space or choose another out=DIRECTORY",
    }
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror.lower()}; {remedies.get(error.errno or 0, 'check the path')}"
