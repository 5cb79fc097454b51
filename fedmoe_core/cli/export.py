"""``fedmoe export``: a run's model as a directory that transformers or peft loads."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from fedmoe_core.base.say import say

GLOBAL = "global"
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Directory to make.")]
Form = Annotated[str, typer.Option("--format", help="hf: a model that transformers loads; peft: adapters.")]
Client = Annotated[str, typer.Option("--client", metavar="NUMBER|global", help="Whose own model; global = of all.")]
Equal = Annotated[
    bool, typer.Option("--equal-experts", help="As many experts in every layer, as servers of models ask for.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace the export in OUT.")]


def run(
    run_dir: Path, out: Path, *, form: str, client: str, equal: bool, force: bool, quiet: bool, as_json: bool
) -> None:
    """Export, and say what was written.

    Raises:
        ValueError: ``client`` is not a number, or as ``exporting.export.export``.
    """
    if client != GLOBAL and not client.isdecimal():
        raise ValueError(f"--client {client!r} is neither a client's number nor {GLOBAL}; give one of them")
    from rich.console import Console

    from fedmoe_core.exporting.export import Format, Order, export, told
    from fedmoe_core.simulation.observer import NullObserver
    from fedmoe_core.simulation.progress import observer_for

    order = Order(cast(Format, form), None if client == GLOBAL else int(client), equal)
    observer = NullObserver() if quiet else observer_for(Console(stderr=True))
    try:
        done = export(run_dir, out, order, force=force, observer=observer)
    finally:
        observer.close()
    if as_json:
        facts: dict[str, Any] = asdict(done.sheet) | {"kept_LE": done.sheet.kept_LE.astype(int).tolist()}
        typer.echo(
            json.dumps({**facts, "path": str(done.path), "bytes": done.bytes, "recorded": done.recorded}, indent=2)
        )
        return
    for line in told(done):
        say(line)
