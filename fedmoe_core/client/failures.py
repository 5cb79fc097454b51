"""What ends one client's round and not the run, and how it is told."""

from __future__ import annotations

import traceback


class ClientTimeoutError(BaseException):
    """A client did not answer in time; not an ``Exception``, so that no client's own ``except`` goes on without us."""


# Whatever a client's step raises is its own trouble, a call of exit() too. Ctrl-C is the user's.
FAILURES = (Exception, SystemExit, ClientTimeoutError)
# Their text says all: a loss that is not finite, a time that is up. Of the others the type and, where they are not of
# the kinds that torch raises, the place are part of the reason.
TOLD = (ArithmeticError, ClientTimeoutError)
USUAL = (RuntimeError, ValueError)
LONGEST = 300  # characters of a reason


def reason_of(error: BaseException) -> str:
    """Return in one sentence what ended a client's round."""
    words = next((line.strip() for line in str(error).splitlines() if line.strip()), "")  # a page of advice may follow
    if isinstance(error, TOLD) and words:
        return words[:LONGEST]
    said = f"{type(error).__name__}: {words}" if words else type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, USUAL) or not frames:
        return said[:LONGEST]
    last = frames[-1]
    return f"{said[: LONGEST - 100]} (in {last.name}, line {last.lineno} of {last.filename[-60:]})"
