"""Words for people: one sentence for one mistake, and text of which every character can be seen."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

# Controls (newline and tab too), lone surrogates, formats such as U+202E that turns the reading direction, line and
# paragraph separators, private and unassigned: a terminal acts on them, or a reader cannot see them.
UNSEEN = frozenset({"Cc", "Cs", "Cf", "Zl", "Zp", "Co", "Cn"})
JOINERS = "\u200c\u200d"  # format characters that Persian, Hindi and emoji need


def visible(text: str) -> str:
    """Return ``text`` on one line, each character that a terminal would act on or a reader cannot see as an escape.

    Example:
        >>> visible("a\\x1b[2J\\n")
        'a\\\\x1b[2J\\\\x0a'
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escape(ord(sign)) if _unseen(sign) else sign for sign in text)


def nearest(word: str, options: Sequence[str]) -> str | None:
    """Return the option that is spelt most like ``word``, whatever the case; None where none is close.

    Example:
        >>> nearest("Taylr", ["s", "taylor"])
        'taylor'
    """
    by_lower = {option.lower(): option for option in options}
    near = get_close_matches(word.lower(), list(by_lower), n=1, cutoff=0.5)
    return by_lower[near[0]] if near else None


def unknown(what: str, word: str, options: Sequence[str]) -> ValueError:
    """Make the error for ``what``, which says ``word``: the nearest of ``options`` by what precedes a colon, then all.

    Example:
        >>> str(unknown("data='cvs:a.csv'", "cvs:a.csv", ["stdlib", "csv:FILE"]))
        "data='cvs:a.csv' is unknown; did you mean 'csv:a.csv'? valid: stdlib, csv:FILE"
    """
    kind, _, rest = word.partition(":")
    forms = {form.partition(":")[0]: form for form in options}
    close = forms.get(nearest(kind, list(forms)) or "", "")
    if rest and ":" in close:
        close = f"{close.partition(':')[0]}:{rest}"
    hint = f"did you mean {close!r}? " if close else ""
    return ValueError(f"{what} is unknown; {hint}valid: {', '.join(options)}")


def differing(was: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the keys under which two mappings differ, each with the value of both; None = absent.

    Example:
        >>> differing({"lr": 0.1, "seed": 0}, {"lr": 0.1, "rounds": 8})
        {'seed': (0, None), 'rounds': (None, 8)}
    """
    return {
        key: (was.get(key), now.get(key))
        for key in {**was, **now}
        if (key in was) != (key in now) or was.get(key) != now.get(key)
    }


def another_configuration(differing: Mapping[str, tuple[Any, Any]]) -> str:
    """Say what a configuration had then and has now, three keys at most.

    Example:
        >>> another_configuration({"seed": (0, 1), "lr": (None, 0.1)})
        'another configuration (seed = 0 then, 1 now; lr = absent then, 0.1 now)'
    """
    shown = {key: ["absent" if value is None else repr(value) for value in pair] for key, pair in differing.items()}
    named = [f"{key} = {was} then, {now} now" for key, (was, now) in list(shown.items())[:3]]
    more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
    return f"another configuration ({'; '.join(named)}{more})"


def _unseen(sign: str) -> bool:
    return sign not in JOINERS and unicodedata.category(sign) in UNSEEN


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
