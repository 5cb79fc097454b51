"""``fedmoe watch``: how a run goes, or several, in a table that follows them; it only reads."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from fedmoe_core.watching.seen import Seen
    from fedmoe_core.watching.watcher import Watcher

RunDirs = Annotated[
    list[Path],
    typer.Argument(metavar="RUN_DIR...", help="Runs, begun or not, or folders of runs such as a comparison."),
]
Once = Annotated[bool, typer.Option("--once", help="Show it once and stop, as where the output is not a terminal.")]
Every = Annotated[float, typer.Option("--every", min=0.1, help="Seconds between two looks.")]
SLICE = 0.1  # seconds of sleep after which a wish to stop is heard
PIPE_WIDTH = 200  # columns where there is no screen: one line a run


def watch(paths: Sequence[Path], *, once: bool, every: float, as_json: bool) -> None:
    """Follow the runs until all have finished, or Ctrl-C; a folder of runs is followed until Ctrl-C.

    Raises:
        ValueError: the only path is a file, or none of several holds a run.
    """
    from rich.live import Live

    from fedmoe_core.watching.view import watch_view

    console = Console()
    if not console.is_terminal:
        console = Console(width=PIPE_WIDTH)
    ascii_only = console.options.ascii_only
    watchers: dict[Path, Watcher] = {}
    if as_json:
        typer.echo(json.dumps([asdict(seen) for seen in _look(paths, watchers)[0]], indent=2))
        return
    if once or not console.is_terminal:
        runs, folders = _look(paths, watchers)
        console.print(watch_view(runs, several=folders or len(paths) > 1, ascii_only=ascii_only))
        return
    with _stop_asked() as asked, Live(console=console, auto_refresh=False) as live:
        while not asked():
            runs, folders = _look(paths, watchers)
            view = watch_view(runs, several=folders or len(paths) > 1, ascii_only=ascii_only)
            live.update(view, refresh=True)
            if not folders and all(seen.state == "finished" for seen in runs):
                return
            until = time.monotonic() + every
            while not asked() and (left := until - time.monotonic()) > 0:
                time.sleep(min(SLICE, left))


def _look(paths: Sequence[Path], watchers: dict[Path, Watcher]) -> tuple[list[Seen], bool]:
    """How each run stands, by its watcher, and whether more runs may appear."""
    from fedmoe_core.watching.find import find_runs
    from fedmoe_core.watching.watcher import Watcher

    runs, folders = find_runs(paths)
    return [watchers.setdefault(run, Watcher(run)).look() for run in runs], folders


@contextmanager
def _stop_asked() -> Iterator[Callable[[], bool]]:
    """Tell, within the block, whether Ctrl-C or what else asks this process to stop has come; it interrupts nothing.

    So no half a frame stays on screen, and the wish cannot be lost: an exception that a signal raises while Python
    finalises an object is dropped, and the table then goes on.
    """
    asked: list[int] = []
    stops = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda number, _: asked.append(number)) for number in stops}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
