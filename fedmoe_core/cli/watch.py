"""``fedmoe watch``: how a run goes, or several, in a table that follows them; it only reads."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live

from fedmoe_core.simulation.directory.claim import MARKER
from fedmoe_core.watching.seen import Seen
from fedmoe_core.watching.view import watch_view
from fedmoe_core.watching.watcher import Watcher

RunDirs = Annotated[
    list[Path],
    typer.Argument(metavar="RUN_DIR...", help="Runs, begun or not, or folders of runs such as a comparison."),
]
Once = Annotated[bool, typer.Option("--once", help="Show it once and stop, as where the output is not a terminal.")]
Every = Annotated[float, typer.Option("--every", min=0.1, help="Seconds between two looks.")]
# From a run's directory up to where a comparison of it lies: RUNS/SYSTEM/SEED below its folder.
DEPTHS = ("*", "*/*", "*/*/*")
PIPE_WIDTH = 200  # columns where there is no screen: one line a run


def watch(paths: Sequence[Path], *, once: bool, every: float, as_json: bool) -> None:
    """Follow the runs until all have finished, or Ctrl-C; a folder of runs is followed until Ctrl-C.

    Raises:
        ValueError: a path is a file, or none of several directories holds a run.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=PIPE_WIDTH)
    ascii_only = console.options.ascii_only
    watchers: dict[Path, Watcher] = {}

    def look() -> tuple[list[Seen], bool]:
        """How each run stands, and whether a folder of runs is among the paths, in which more may appear."""
        folders = any(_runs_below(path) for path in paths)
        runs = dict.fromkeys(run for path in paths for run in _runs_of(path, alone=len(paths) == 1))
        if not runs:
            raise ValueError(f"none of {len(paths)} paths holds a run; give the directories that runs named as out")
        return [watchers.setdefault(run, Watcher(run)).look() for run in runs], folders

    if as_json:
        typer.echo(json.dumps([asdict(seen) for seen in look()[0]], indent=2))
        return
    if once or not console.is_terminal:
        runs, folders = look()
        console.print(watch_view(runs, several=folders or len(paths) > 1, ascii_only=ascii_only))
        return
    with suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        while True:
            with _whole():
                runs, folders = look()
                view = watch_view(runs, several=folders or len(paths) > 1, ascii_only=ascii_only)
                live.update(view, refresh=True)
            if not folders and all(seen.state == "finished" for seen in runs):
                return
            time.sleep(every)


@contextmanager
def _whole() -> Iterator[None]:
    """Let Ctrl-C, and what else asks this process to stop, wait until the block ends: half a frame stays on screen."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _runs_of(path: Path, *, alone: bool) -> Iterator[Path]:
    """The runs that a path stands for: itself, or those below it; one that is ``alone`` may be yet to come."""
    if path.exists() and not path.is_dir():
        if alone:
            raise ValueError(f"{path} is not a directory; give the directory of a run")
        return
    if below := _runs_below(path):
        yield from below
    elif alone or (path / MARKER).is_file():
        yield path


def _runs_below(path: Path) -> list[Path]:
    """Runs in a folder that is not a run itself."""
    if (path / MARKER).exists() or not path.is_dir():
        return []
    return sorted(found.parent for depth in DEPTHS for found in path.glob(f"{depth}/{MARKER}"))
