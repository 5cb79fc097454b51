"""``fedmoe compare`` and ``fedmoe systems``: which system to use on your own model and data."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from fedmoe_core.base import show
from fedmoe_core.base.say import say
from fedmoe_core.base.wording import visible

if TYPE_CHECKING:
    from fedmoe_core.comparison.jobs import JobOutcome
    from fedmoe_core.comparison.study import Study

Words = Annotated[
    list[str] | None, typer.Argument(metavar="CONFIG.toml|KEY=VALUE", help="What all systems share, as for simulate.")
]
Systems = Annotated[str, typer.Option(help="Names separated by commas, or all; the first is the subject of the tests.")]
Seeds = Annotated[str, typer.Option(help="Such as 0-7 or 0,3,5.")]
Out = Annotated[Path, typer.Option(help="Directory of the comparison; the same words go on with what is there.")]
Workers = Annotated[int, typer.Option(help="Runs at once; 0 = one for every two cores.")]
Target = Annotated[
    float | None,
    typer.Option(help="Quality to reach ('target'). Default: by seed, midway between best start and best end."),
]
Beside = Annotated[
    Path | None,
    typer.Option(help="compare.json of an earlier comparison: its other systems stand in the table, not run again."),
]
Force = Annotated[bool, typer.Option("--force", help="Replace runs in out of other settings, data or code.")]
Variants = Annotated[
    Path | None, typer.Option(help='TOML file whose table "systems" has lines: label = ["key=value", ...].')
]


class Watch:
    """One line for every run that ends: how many are done, how it went, and when the rest may be."""

    def __init__(self, total: int, console: Console) -> None:
        self.total, self.done, self.console = total, 0, console

    def __call__(self, outcome: JobOutcome, left: float) -> None:
        self.done += 1
        how = f"failed: {outcome.error}" if outcome.error else "done before" if outcome.cached else "done"
        parts = [f"{self.done}/{self.total}", f"{outcome.job.name}: {how}"]
        if not outcome.cached:
            parts += [f"took {show.seconds(outcome.seconds)}", f"about {show.seconds(left)} left"]
        self.console.print(Text(visible(", ".join(parts))))


def run(study: Study, console: Console, *, force: bool) -> int:
    """Run a study and print its table; the exit code, 1 where runs are missing, broke a budget or trained nothing."""
    from fedmoe_core.comparison.compare import compare

    found = compare(study, Watch(len(study.jobs()), console), force=force)
    for line in found.lines:
        say(line)
    for note in found.notes:
        say(f"note: {note}", err=True)
    for problem in found.problems:
        say(f"error: {problem}", err=True)
    if found.missing:
        names = "; ".join(job.name for job in found.missing[:5])
        more = f" and {len(found.missing) - 5} more" if len(found.missing) > 5 else ""
        runs = show.plural(len(found.missing), "run")
        say(f"error: {runs} still missing ({names}{more}); the same command goes on", err=True)
    return 1 if found.missing or found.problems else 0


def show_systems(*, as_json: bool) -> None:
    """Print the card of every system."""
    from fedmoe_core.config.systems import installed, listing

    cards = []
    for place in installed().values():
        module, _, attribute = place.partition(":")
        cards.append(getattr(import_module(module), attribute).card)
    if as_json:
        typer.echo(json.dumps([asdict(card) for card in cards], indent=2))
    else:
        for line in listing(cards).split("\n"):
            say(line)
