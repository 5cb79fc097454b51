"""How runs stand, drawn for a terminal: one run in full, or one line for each of several."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedmoe_core.base import show
from fedmoe_core.base.wording import visible
from fedmoe_core.watching.seen import Seen

BARS = "▁▂▃▄▅▆▇█"
PLAIN_BARS = "_.-=*#"  # where the terminal has ASCII alone
WIDE, NARROW = 32, 16  # signs of a curve: of one run, of one of several
STYLES = {"running": "green", "preparing": "cyan", "finished": "blue", "stopped": "yellow", "not begun": "dim"}
FEW = 6  # reasons, and tiers, that are shown
QUIET = 60.0  # seconds without a line, and five rounds long, after which the view says so


def watch_view(runs: Sequence[Seen], *, several: bool, ascii_only: bool = False) -> RenderableType:
    """Draw one run, or ``several`` in a table; no text of a run is read as markup or reaches the terminal as a code."""
    bars = PLAIN_BARS if ascii_only else BARS
    if several:
        return _table_of(runs, bars)
    (seen,) = runs
    parts: list[RenderableType] = [_headline(seen), *([_progress(seen)] if seen.rounds else []), _figures(seen, bars)]
    if seen.tiers:
        parts += [_text(""), _tiers(seen)]
    parts += [_text(line, "yellow") for line in [*_reasons(seen), *seen.problems]]
    return Group(*parts, *([_text(hint, STYLES[seen.state])] if (hint := hint_of(seen)) else []))


def hint_of(seen: Seen) -> str:
    """Say what a reader should know of the state; empty where it is what it should be."""
    if seen.state == "stopped":
        how = f"go on with: fedmoe resume {seen.path}" if seen.resumable else "there is no checkpoint yet, start again"
        return f"stopped; {how}"
    if seen.state == "not begun":
        return f"there is no run in {seen.path} yet; without --once the command waits for one"
    if seen.state == "preparing":
        return "before the first round: data, warm-up and a first measurement"
    slow = max(QUIET, 5 * (seen.round_seconds or 0.0))
    if seen.state == "running" and (seen.silent_seconds or 0.0) > slow:
        return f"no line for {show.seconds(seen.silent_seconds)}; the process is still there"
    return ""


def curve(values: Sequence[float], width: int, bars: str = BARS) -> str:
    """Draw values as a line of bars, the lowest value the lowest bar; of more than ``width``, means of equal parts.

    Example:
        >>> curve([3.0, 2.0, 1.0, 1.0], 32)
        '█▅▁▁'
    """
    if len(values) > width:
        ends = [round(place * len(values) / width) for place in range(width + 1)]
        values = [fmean(values[first:last]) for first, last in pairwise(ends)]
    if not values:
        return ""
    low, high = min(values), max(values)
    step = (high - low) / (len(bars) - 1) or 1.0
    return "".join(bars[int((value - low) / step + 0.5)] for value in values)


def _text(text: str, style: str = "") -> Text:
    return Text(visible(text), style=style)


def _name(text: str) -> Text:
    """A name in a table: it alone gives way where the terminal is narrow, its end first."""
    return Text(visible(text), overflow="ellipsis", no_wrap=True)


def _headline(seen: Seen) -> Table:
    line = Table.grid(padding=(0, 2))
    line.add_row(_text(seen.title or seen.path, "bold"), _text(seen.state, STYLES[seen.state]))
    return line


def _progress(seen: Seen) -> Table:
    line = Table.grid(padding=(0, 2))
    done = max(seen.round, 0)
    said = [f"round {done} of {seen.rounds}"]
    said += [f"{show.seconds(seen.round_seconds)} a round"] if seen.round_seconds is not None else []
    said += [f"{show.seconds(seen.seconds_left)} left"] if seen.seconds_left is not None else []
    bar = ProgressBar(total=seen.rounds, completed=done, width=24, complete_style="blue", finished_style="blue")
    line.add_row(bar, _text("   ".join(said)))
    return line


def _figures(seen: Seen, bars: str) -> Table:
    grid = Table.grid(padding=(0, 2))
    for name, values, text in (("loss", seen.loss_R, show.number), ("accuracy", seen.accuracy_R, show.share)):
        if values:
            grid.add_row(name, _text(f"{text(values[0])} -> {text(values[-1])}"), _text(curve(values, WIDE, bars)))
    if seen.worst_loss is not None:
        grid.add_row("worst client", _text(show.number(seen.worst_loss)))
    if seen.coverage is not None:
        grid.add_row("experts trained", _text(show.share(seen.coverage, 0)), _text("in the last round"))
    if seen.bytes_down is not None and seen.bytes_up is not None:
        ways = f"down {show.size(seen.bytes_down)}, up {show.size(seen.bytes_up)}"
        grid.add_row("moved", _text(show.size(seen.bytes_down + seen.bytes_up)), _text(ways))
    if seen.memory_bytes is not None:
        grid.add_row("peak memory", _text(show.size(seen.memory_bytes)), _text("of a client"))
    if seen.virtual_seconds is not None:
        grid.add_row("virtual time", _text(show.seconds(seen.virtual_seconds)))
    if seen.answers:
        grid.add_row("updates", _text(_answers(seen)))
    return grid


def _answers(seen: Seen) -> str:
    words = {"ok": "accepted", "": "without a status"}
    counted = sorted(seen.answers.items(), key=lambda pair: (pair[0] != "ok", pair[0]))
    return ", ".join(f"{count} {words.get(status, status)}" for status, count in counted)


def _reasons(seen: Seen) -> list[str]:
    """The most frequent reasons for which updates did not count."""
    found = [(group, status) for status, groups in seen.reasons.items() for group in groups]
    found.sort(key=lambda pair: -pair[0].times)
    lines = []
    for group, status in found[:FEW]:
        when = f"round {group.first}" if group.first == group.last else f"rounds {group.first} to {group.last}"
        whose = f"client {group.clients[0]}" if len(group.clients) == 1 else f"{len(group.clients)} clients"
        lines.append(f"{status} {group.times}, {whose}, {when}: {group.reason}")
    more = len(found) - FEW
    return [*lines, f"and {show.plural(more, 'more reason')}"] if more > 0 else lines


def _tiers(seen: Seen) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("tier")
    for head in ("clients", "accepted", "loss", "worst", "most of its budget"):
        table.add_column(head, justify="right", no_wrap=True)
    for tier in seen.tiers[:FEW]:
        used = f"{show.share(tier.part, 0)} of {tier.of}" if tier.of else "no limit"
        counts = (str(tier.clients), f"{tier.accepted}/{tier.answers}")
        losses = (show.number(tier.loss), show.number(tier.worst_loss))
        figures = [_text(cell) for cell in (*counts, *losses)]
        table.add_row(_name(tier.tier), *figures, _text(used, "red" if tier.part > 1 else ""))
    if (more := len(seen.tiers) - FEW) > 0:
        table.add_row(_text(f"and {show.plural(more, 'more tier')}", "dim"))
    return table


def _table_of(runs: Sequence[Seen], bars: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("run")
    table.add_column("state", no_wrap=True)
    for head in ("round", "loss"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for head in ("accuracy", "worst", "not counted", "a round", "left"):
        table.add_column(head, justify="right", no_wrap=True)
    places = [os.path.abspath(seen.path) for seen in runs]
    shared = os.path.commonpath([os.path.dirname(place) for place in places])
    for seen, place in zip(runs, places, strict=True):
        lost = sum(count for status, count in seen.answers.items() if status != "ok")
        table.add_row(
            _name(os.path.relpath(place, shared)),
            _text(seen.state, STYLES[seen.state]),
            _text(f"{max(seen.round, 0)}/{seen.rounds}" if seen.rounds else ""),
            _text(show.number(seen.loss_R[-1]) if seen.loss_R else ""),
            _text(curve(seen.loss_R, NARROW, bars)),
            _text(show.share(seen.accuracy_R[-1]) if seen.accuracy_R else ""),
            _text(show.number(seen.worst_loss) if seen.worst_loss is not None else ""),
            _text(str(lost) if lost else "", "yellow"),
            _text(show.seconds(seen.round_seconds) if seen.round_seconds is not None else ""),
            _text(show.seconds(seen.seconds_left) if seen.seconds_left is not None else ""),
        )
    return table
