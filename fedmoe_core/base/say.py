"""The one door to the terminal: what goes through it moves no cursor, changes no colour, hides no word, ends no run."""

from __future__ import annotations

import errno
import os
import sys
from contextlib import suppress
from typing import Any, TextIO, cast

import typer

from fedmoe_core.base.wording import visible


class Unbroken:
    """A standard stream that may have lost its reader: what is left to say is dropped, and the run goes on.

    Standard error only shows how a run goes, so no trouble of it counts: a full disk, a terminal that was closed.
    Standard output is what was asked for. Of that, too, a reader may go away, as the one of ``| head`` does; whatever
    else goes wrong there is an error.
    """

    def __init__(self, stream: TextIO, *, shows_progress: bool) -> None:
        self._stream, self._shows_progress = stream, shows_progress

    def write(self, text: str) -> int:
        """Write text, or drop it."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        """Hand on what was written, or drop it."""
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        if not self._shows_progress and error.errno != errno.EPIPE:
            raise OSError(
                f"standard output cannot be written ({error.strerror}); what the command did stays, its words are lost"
            ) from None
        # What still lies in the buffer, and all that follows, goes where it troubles none, Python's own end included.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def hold_streams() -> None:
    """Let no state of the standard streams end a run, nor a closed one lend its number to a file of the run.

    What any library prints would go into that file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is this one
    if sys.stdout is not None:
        sys.stdout = cast(TextIO, Unbroken(sys.stdout, shows_progress=False))
    if sys.stderr is not None:
        sys.stderr = cast(TextIO, Unbroken(sys.stderr, shows_progress=True))


def say(text: str, *, err: bool = False) -> None:
    """Print one line, on standard error where ``err``; names in it may come from anyone's files."""
    typer.echo(visible(text), err=err)
