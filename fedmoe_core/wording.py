"""One sentence for one mistake: the offender, and the nearest thing that would have worked."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches


def unknown(kind: str, word: str, options: Sequence[str]) -> ValueError:
    """Make the error for a name that does not exist: the nearest valid one (by what precedes a colon), then all."""
    heads = {option.partition(":")[0]: option for option in options}
    near = get_close_matches(word.partition(":")[0], list(heads), n=1, cutoff=0.5)
    hint = f"did you mean {heads[near[0]]!r}? " if near else ""
    return ValueError(f"{kind} {word!r} is unknown; {hint}valid: {', '.join(options)}")
