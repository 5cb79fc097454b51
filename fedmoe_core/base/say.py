"""The one door to the terminal: what goes through it cannot move the cursor, change a colour or hide a word."""

from __future__ import annotations

import typer

from fedmoe_core.base.wording import visible


def say(text: str, *, err: bool = False) -> None:
    """Print one line, on standard error where ``err``; names in it may come from anyone's files."""
    typer.echo(visible(text), err=err)
