"""An extension of griffe that teaches it two habits of this repository's docstrings."""

from __future__ import annotations

import re
from typing import Any

import griffe

# "a, b: text", also over several lines, as an entry of a section.
TOGETHER = re.compile(r"^    (\*{0,2}\w+(?:,\s+\*{0,2}\w+)+):((?:.*)(?:\n {5,}\S.*)*)", flags=re.MULTILINE)


class House(griffe.Extension):
    """Changes docstrings before they are parsed, which happens when a page shows them."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Read ``Example:`` as Google's ``Examples:``, and each of several names before one text as an entry."""
        if obj.docstring:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = TOGETHER.sub(_apart, text)


def _apart(match: re.Match[str]) -> str:
    names, text = re.split(r",\s+", match.group(1)), match.group(2)
    return "\n".join(f"    {name}:{text}" for name in names)
