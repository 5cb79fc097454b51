"""One sentence for one mistake: the offender, and the nearest thing that would have worked."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches


def unknown(kind: str, word: str, options: Sequence[str]) -> ValueError:
    """The error for a name that does not exist, naming the nearest valid one and then all of them."""
    near = get_close_matches(word, options, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return ValueError(f"{kind} {word!r} is unknown; {hint}valid: {', '.join(options)}")
