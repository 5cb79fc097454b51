"""How a run reports its progress: a live view on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as Eta
from rich.text import Text

from fedmoe_core.base import show
from fedmoe_core.base.wording import visible
from fedmoe_core.simulation.directory.refusals import by_reason
from fedmoe_core.simulation.observer import Observer

FEW = 5  # refused updates of a round that are told one by one, clients that a line names, and reasons


class LineObserver(Observer):
    """An observer that prints one line per event that matters: for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.rounds = RoundLines()
        self.quarter: tuple[str, int] = ("", 0)

    def on_start(self, info: Mapping[str, Any]) -> None:
        self._say(headline(info))

    def on_stage(self, text: str) -> None:
        self._say(text)

    def on_progress(self, stage: str, done: int, total: int) -> None:
        quarter = (stage, 4 * done // max(total, 1))
        if quarter != self.quarter and quarter[1]:
            self._say(f"{stage}: {done}/{total}")
        self.quarter = quarter

    def on_round(self, round: int, rounds: int, record: Mapping[str, Any]) -> None:
        for line in self.rounds.of(round, rounds, record):
            self._say(line)

    def _say(self, text: str) -> None:
        self.console.print(Text(visible(text)), soft_wrap=True)


class LiveObserver(Observer):
    """A live view: a bar over all rounds with an estimate of the time left, one over the clients of the round."""

    def __init__(self, console: Console) -> None:
        bar = BarColumn(bar_width=32, complete_style="blue", finished_style="blue")
        columns = (TextColumn("{task.description}"), bar, MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"))
        self.progress = Progress(*columns, Eta(), console=console, transient=True)
        self.rounds = RoundLines()
        self.tasks: dict[str, TaskID] = {}
        self.clients = 0

    def on_start(self, info: Mapping[str, Any]) -> None:
        self.progress.start()
        self.clients = int(info.get("clients_per_round") or 0)
        self._say(headline(info), "bold")

    def on_stage(self, text: str) -> None:
        self.progress.start()
        self._clear()
        self._say(text, "dim")

    def on_progress(self, stage: str, done: int, total: int) -> None:
        self._bar(stage, done, total, stage)
        if done >= total:
            self._clear()

    def on_client(self, round: int, client: int, record: Mapping[str, Any]) -> None:
        task = self.tasks.get("clients")
        done = 1 + (int(self.progress.tasks[self.progress.task_ids.index(task)].completed) if task is not None else 0)
        self._bar("clients", done, self.clients or done, client_line(client, record), "dim")
        if "rounds" in self.tasks:
            self.progress.advance(self.tasks["rounds"])

    def on_round(self, round: int, rounds: int, record: Mapping[str, Any]) -> None:
        first, *rest = self.rounds.of(round, rounds, record)
        self._say(first)
        for line in rest:
            self._say(line, "yellow")
        per_round = max(self.clients, 1)
        self._clear("clients")
        self._bar("rounds", round * per_round, rounds * per_round, f"round {min(round + 1, rounds)}/{rounds}")

    def on_end(self, summary: Mapping[str, Any]) -> None:
        self.close()

    def close(self) -> None:
        """Take the bars off the screen; safe to call twice."""
        self._clear()
        self.progress.stop()

    def _say(self, text: str, style: str = "") -> None:
        self.progress.print(Text(visible(text), style=style))

    def _bar(self, name: str, done: int, total: int, text: str, style: str = "none") -> None:
        text = f"[{style}]{escape(visible(text))}[/{style}]"  # a bar reads its description as markup
        if name not in self.tasks:
            self.tasks[name] = self.progress.add_task(text, total=total, completed=done)
        self.progress.update(self.tasks[name], completed=done, total=total, description=text)

    def _clear(self, *names: str) -> None:
        for name in names or tuple(self.tasks):
            if name in self.tasks:
                self.progress.remove_task(self.tasks.pop(name))


class RoundLines:
    """The lines of one round after another; remembers the loss before it, to show the change."""

    def __init__(self) -> None:
        self.loss: float | None = None
        self.traffic = 0

    def of(self, round: int, rounds: int, record: Mapping[str, Any]) -> list[str]:
        """Write one line of figures, and one more for every update that was refused."""
        width = len(str(rounds))
        loss = record.get("loss")
        parts = [f"round {round:>{width}}/{rounds}" if round else f"before {'':>{2 * width - 1}} "]
        if loss is not None:
            change = f" ({show.signed(loss - self.loss)})" if self.loss is not None else ""
            parts.append(f"held-out loss {show.number(loss)}{change}")
            self.loss = loss
        if record.get("accuracy") is not None:
            parts.append(f"accuracy {show.share(record['accuracy'])}")
        own = [value for value in record.get("personal_loss_C") or () if value is not None]
        if own:
            parts.append(f"own models {show.number(sum(own) / len(own))}")
        losses = [value for value in record.get("loss_clients") or own if value is not None]
        if losses:
            parts.append(f"worst client {show.number(max(losses))}")
        if round:
            traffic = int(record.get("bytes_down_total") or 0) + int(record.get("bytes_up_total") or 0)
            parts.append(f"moved {show.size(traffic - self.traffic)}")
            self.traffic = traffic
            if record.get("coverage") is not None:
                parts.append(f"experts trained {show.share(record['coverage'], 0)}")
            if record.get("epsilon") is not None:
                parts.append(f"epsilon {show.number(record['epsilon'])}")
            parts.append(show.seconds(record.get("seconds")))
        return ["   ".join(parts), *refusal_lines(round, record.get("refused") or ())]


def refusal_lines(round: int, refused: Sequence[Mapping[str, Any]]) -> list[str]:
    """Write one line for each refused update; of more than ``FEW``, one for each of the most frequent reasons."""
    if len(refused) <= FEW:
        return [f"  refused client {item['client']}: {item['reason']}" for item in refused]
    groups = by_reason((round, item) for item in refused)
    lines = []
    for group in groups[:FEW]:
        names = ", ".join(map(str, group.clients[:FEW]))
        more = f" and {len(group.clients) - FEW} more" if len(group.clients) > FEW else ""
        whose = f"client {names}" if len(group.clients) == 1 else f"{len(group.clients)} clients ({names}{more})"
        lines.append(f"  refused {whose}: {group.reason}")
    if left := groups[FEW:]:
        lines.append(
            f"  refused {sum(group.times for group in left)} more, for {show.plural(len(left), 'more reason')}"
        )
    return lines


def headline(info: Mapping[str, Any]) -> str:
    """Write one line that says what is about to run."""
    label = info.get("label") or info.get("algorithm", "run")
    parts = [f"{label}: {info.get('model', '?')} on {info.get('data', '?')}"]
    if info.get("rounds"):
        parts.append(show.plural(int(info["rounds"]), "round"))
    if info.get("in_flight"):
        answers = show.plural(int(info["clients_per_round"]), "answer")
        parts.append(f"buffered: {show.plural(int(info['in_flight']), 'client')} in flight, a step after {answers}")
    elif info.get("clients_per_round"):
        parts.append(f"{show.plural(int(info['clients_per_round']), 'client')} a round")
    if info.get("first_round"):
        parts.append(f"resumed after round {info['first_round']}")
    return ", ".join(parts)


def client_line(client: int, record: Mapping[str, Any]) -> str:
    """Write one line for one client of a round."""
    name = f"client {client}" + (f" ({record['tier']})" if record.get("tier") else "")
    if record.get("status") == "late":
        return f"{name} {record.get('error')}"
    if record.get("status", "ok") != "ok":
        return f"{name} failed: {record.get('error') or 'no reason given'}"
    return f"{name}: loss {show.number(record.get('loss_first'))} to {show.number(record.get('loss_last'))}"


def observer_for(console: Console) -> Observer:
    """Choose a live view on a terminal, lines elsewhere."""
    return LiveObserver(console) if console.is_terminal else LineObserver(console)
