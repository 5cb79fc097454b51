"""An extension of griffe that teaches it the habits of this repository's docstrings."""

from __future__ import annotations

import re
from typing import Any

import griffe

# "a, b: text", also over several lines, as an entry of a section.
TOGETHER = re.compile(r"^    (\*{0,2}\w+(?:,\s+\*{0,2}\w+)+):((?:.*)(?:\n {5,}\S.*)*)", flags=re.MULTILINE)
# A section of attributes with a condition in its title; griffe would give some of them the type of others.
CONDITIONAL = re.compile(r"^(Attributes that .*:)\n((?:    .*(?:\n|$))+)", flags=re.MULTILINE)


class House(griffe.Extension):
    """Changes docstrings before they are parsed, which happens when a page shows them."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Read ``Example:`` as Google's ``Examples:``, several names before one text as an entry each."""
        if obj.docstring:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = CONDITIONAL.sub(_listed, TOGETHER.sub(_apart, text))


def _apart(match: re.Match[str]) -> str:
    names, text = re.split(r",\s+", match.group(1)), match.group(2)
    return "\n".join(f"    {name}:{text}" for name in names)


def _listed(match: re.Match[str]) -> str:
    entries = re.sub(r"^    (\w+):", r"- `\1`:", match.group(2), flags=re.MULTILINE)
    return f"{match.group(1)}\n\n{entries}"
