"""Looks at a run directory again and again: reads what is new, counts it up and tells how the run stands."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from typing import Any

from fedmoe_core.base.show import plural
from fedmoe_core.base.wording import visible
from fedmoe_core.budget.resources import RESOURCES
from fedmoe_core.config.systems import title_of
from fedmoe_core.simulation.directory import run_schema
from fedmoe_core.simulation.directory.claim import CHECKPOINT, read_facts
from fedmoe_core.simulation.directory.health import problems
from fedmoe_core.simulation.directory.refusals import Refusals, by_reason
from fedmoe_core.watching.lines import LEDGER, METRICS, LedgerLine, MetricsLine, new_lines
from fedmoe_core.watching.lock import in_use
from fedmoe_core.watching.seen import Seen, State, TierSeen
from fedmoe_core.watching.tail import Tail

RECENT = 10  # rounds whose mean tells how long the next will take
MOST = 10**7  # clients or rounds that a configuration is believed to have
NO_LINE = MetricsLine("round", -1)


class Watcher:
    """One run directory that is looked at again and again; it reads only what is new, and writes nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._metrics, self._ledger = Tail(path / "metrics.jsonl"), Tail(path / "ledger.jsonl")
        self._config: tuple[Any, dict[str, Any]] = (None, {})
        self._forget_metrics()
        self._forget_ledger()

    def _forget_metrics(self) -> None:
        self._last = self._judged = NO_LINE
        self._loss: list[float] = []
        self._accuracy: list[float] = []
        self._seconds: list[float] = []
        self._answers: dict[int, Counter[str]] = {}  # by client, then by status
        self._trouble: dict[str, list[tuple[int, dict[str, Any]]]] = {}
        self._reasons: dict[str, tuple[Refusals, ...]] = {}
        self._unread = 0

    def _forget_ledger(self) -> None:
        self._memory: float | None = None
        self._parts: dict[int, tuple[float, str]] = {}  # by client: the largest used part of a limit, and of which

    def look(self) -> Seen:
        """Read what is new and tell how the run stands."""
        used = in_use(self.path)  # before the summary is looked for: it is written before the lock is left
        config = self._read_config()
        if self._metrics.rewound():
            self._forget_metrics()
        if self._ledger.rewound():
            self._forget_ledger()
        self._read_on()
        summary: dict[str, Any] = {}
        found: list[str] = []
        finished = (self.path / "summary.json").is_file()
        if finished:
            try:
                summary = run_schema.read_summary(self.path / "summary.json")
            except (OSError, ValueError) as error:
                found.append(visible(str(error)))
        return self._seen(config, used, found + problems(summary), finished=finished)

    def _read_on(self) -> None:
        for line in new_lines(self._metrics, METRICS):
            if line is None:
                self._unread += 1
            elif line.type == "round":
                self._add_round(line)
            elif line.type == "client":
                self._add_client(line)
        for entry in new_lines(self._ledger, LEDGER):
            if entry is not None:
                self._add_entry(entry)

    def _add_round(self, line: MetricsLine) -> None:
        self._last = line
        if line.loss is not None or line.losses:
            self._judged = line
            known = [loss for loss in line.losses if loss is not None]
            loss = line.loss if line.loss is not None else fmean(known) if known else None
            self._loss += [] if loss is None else [loss]
            self._accuracy += [] if line.accuracy is None else [line.accuracy]
        if line.round and line.seconds is not None:
            self._seconds = [*self._seconds, line.seconds][-RECENT:]

    def _add_client(self, line: MetricsLine) -> None:
        self._answers.setdefault(line.client, Counter())[line.status] += 1
        if line.status != "ok":
            item = (line.round, {"client": line.client, "reason": line.error})
            self._trouble.setdefault(line.status, []).append(item)
            self._reasons.pop(line.status, None)

    def _add_entry(self, entry: LedgerLine) -> None:
        memory = entry.real.get("memory_bytes")
        if memory is not None:
            self._memory = max(memory, self._memory or 0)
        for word, resource in RESOURCES.items():
            limit, used = entry.budget.get(resource.attribute), entry.real.get(resource.attribute)
            if limit and used is not None:
                self._parts[entry.client] = max(self._parts.get(entry.client, (0.0, "")), (used / limit, word))

    def _read_config(self) -> dict[str, Any]:
        """The configuration, read again where another one came; {} before there is one."""
        file = self.path / "config.toml"
        try:
            facts = file.stat()
            stamp = (facts.st_ino, facts.st_size, facts.st_mtime_ns)
            if self._config[0] != stamp:
                self._config = (stamp, run_schema.read_config(file))
        except (OSError, ValueError):
            self._config = (None, {})
        return self._config[1]

    def _seen(self, config: Mapping[str, Any], used: bool | None, found: list[str], *, finished: bool) -> Seen:
        last, judged, rounds = self._last, self._judged, _count(config, "rounds")
        state = self._state(used, begun=last is not NO_LINE, finished=finished)
        round_seconds, silent = fmean(self._seconds) if self._seconds else None, self._silent()
        left = None
        if state == "running" and round_seconds is not None and rounds:
            left = max(0.0, (rounds - last.round) * round_seconds - min(silent or 0.0, round_seconds))
        for status, items in self._trouble.items():
            if status not in self._reasons:
                self._reasons[status] = tuple(by_reason(items))
        if self._unread:
            found = [*found, f"{plural(self._unread, 'line')} of metrics.jsonl cannot be read"]
        return Seen(
            path=str(self.path),
            state=state,
            title=_title(config),
            round=last.round,
            rounds=rounds,
            loss_R=tuple(self._loss),
            accuracy_R=tuple(self._accuracy),
            worst_loss=max((loss for loss in judged.losses if loss is not None), default=None),
            answers=dict(sum(self._answers.values(), Counter())),
            reasons=dict(self._reasons),
            tiers=tuple(self._tiers(config, judged)),
            bytes_down=last.bytes_down_total,
            bytes_up=last.bytes_up_total,
            virtual_seconds=last.virtual_seconds_total,
            memory_bytes=self._memory,
            coverage=last.coverage,
            round_seconds=round_seconds,
            seconds_left=left,
            silent_seconds=silent,
            resumable=any((self.path / CHECKPOINT).glob("checkpoint.json")),
            problems=tuple(found),
        )

    def _state(self, used: bool | None, *, begun: bool, finished: bool) -> State:
        if finished:
            return "finished"
        if used or (used is None and begun):
            return "running" if begun else "preparing"
        return "stopped" if self._marked() else "not begun"

    def _marked(self) -> bool:
        with suppress(ValueError):
            return read_facts(self.path) is not None
        return True  # by another version of fedmoe

    def _silent(self) -> float | None:
        with suppress(OSError):
            return max(0.0, time.time() - (self.path / "metrics.jsonl").stat().st_mtime)
        return None

    def _tiers(self, config: Mapping[str, Any], judged: MetricsLine) -> list[TierSeen]:
        """The budgets are dealt to the clients in turn."""
        budgets = [str(budget).strip() for budget in config.get("budgets") or ()]
        members: dict[str, list[int]] = {budget: [] for budget in budgets}
        for client in range(_count(config, "clients") if budgets else 0):
            members[budgets[client % len(budgets)]].append(client)
        return [self._tier(tier, clients, judged.losses) for tier, clients in members.items()]

    def _tier(self, tier: str, clients: Sequence[int], loss_C: Sequence[float | None]) -> TierSeen:
        answers = [self._answers[client] for client in clients if client in self._answers]
        losses = [loss for client in clients if client < len(loss_C) and (loss := loss_C[client]) is not None]
        part, of = max((self._parts[client] for client in clients if client in self._parts), default=(0.0, ""))
        return TierSeen(
            tier=tier,
            clients=len(clients),
            answers=sum(counts.total() for counts in answers),
            accepted=sum(counts["ok"] for counts in answers),
            loss=fmean(losses) if losses else None,
            worst_loss=max(losses, default=None),
            part=part,
            of=of,
        )


def _count(config: Mapping[str, Any], key: str) -> int:
    found = config.get(key)
    return found if isinstance(found, int) and 0 <= found <= MOST else 0


def _title(config: Mapping[str, Any]) -> str:
    if not config:
        return ""
    plain = config.get("model") == "own"
    what = config.get("adapter") if plain else f"{config.get('model', '?')} on {config.get('data', '?')}"
    return f"{title_of(str(config.get('algorithm', '')))}: {what}"
