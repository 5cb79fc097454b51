"""What each system is: its paper, the equations implemented, how sure we are of them, and what is not there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.console import Group
from rich.table import Table
from rich.text import Text

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
        title: how people call it.
        paper: title or authors, and identifier; "this package" for our own.
        equations: what is implemented.
        approximated: sentences, each one departure from the paper.
        missing: sentences, each something of the paper that is not here.
        global_model: whether it yields one model for everybody.
    """

    name: str
    title: str
    paper: str
    equations: tuple[Equation, ...]
    approximated: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    global_model: bool = True


def as_json(systems: Sequence[System]) -> list[dict[str, Any]]:
    """The systems in JSON types."""
    return [asdict(system) for system in systems]


def listing(systems: Sequence[System]) -> Group:
    """A table with one block per system, and what the tags mean."""
    table = Table(title="systems", title_justify="left", show_lines=True)
    for column in ("algorithm", "paper", "equations", "approximated", "missing"):
        table.add_column(column, overflow="fold")
    for system in systems:
        equations = Text("\n".join(f"{e.number} [{e.tag}] {e.what}" for e in system.equations))
        rest = [Text("\n".join(part) or "nothing known") for part in (system.approximated, system.missing)]
        table.add_row(f"{system.name}\n{system.title}", Text(system.paper), equations, *rest)
    return Group(table, Text("\n".join(f"[{tag}] {meaning}" for tag, meaning in TAGS.items())))
