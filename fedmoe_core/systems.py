"""What each system is: its paper, the equations implemented, how sure we are of them, and what is not there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from textwrap import fill
from typing import Any, Literal

Tag = Literal["P", "N", "A", "D", "E"]
TAGS: dict[Tag, str] = {
    "P": "read in the paper itself",
    "N": "from published notes that quote the paper's numbered equations",
    "A": "from the abstract only",
    "D": "derived here",
    "E": "our engineering reading where the paper is silent",
}


@dataclass(frozen=True)
class Equation:
    """One implemented formula: its number in the paper (or a name), the evidence for it, and what it says."""

    number: str
    tag: Tag
    what: str


@dataclass(frozen=True)
class System:
    """One federated system as this package has it.

    Attributes:
        name: the value of ``algorithm``.
        title: what people call it.
        paper: title or authors, and identifier; "this package" for our own.
        equations: what is implemented.
        approximated: sentences, each one departure from the paper.
        missing: sentences, each something of the paper that is not here.
    """

    name: str
    title: str
    paper: str
    equations: tuple[Equation, ...]
    approximated: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


def as_json(systems: Sequence[System]) -> list[dict[str, Any]]:
    """Put the systems into JSON types."""
    return [asdict(system) for system in systems]


def listing(systems: Sequence[System]) -> str:
    """Write one block per system, wrapped at 100 columns, and what the tags mean."""
    blocks = []
    for system in systems:
        lines = [f"{system.name}: {system.title} ({system.paper})"]
        lines += [_wrapped(f"[{e.tag}] {e.number}: {e.what}") for e in system.equations]
        lines += [_wrapped(f"approximated: {sentence}") for sentence in system.approximated]
        lines += [_wrapped(f"missing: {sentence}") for sentence in system.missing]
        blocks.append("\n".join(lines))
    return "\n\n".join([*blocks, "\n".join(f"[{tag}] {meaning}" for tag, meaning in TAGS.items())])


def _wrapped(text: str) -> str:
    return fill(text, 100, initial_indent="  ", subsequent_indent="      ")
