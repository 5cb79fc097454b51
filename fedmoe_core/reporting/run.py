"""A run as its directory tells it: read back for the report, tolerant of what an unfinished run lacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fedmoe_core.base import show
from fedmoe_core.base.wording import visible
from fedmoe_core.config.systems import title_of
from fedmoe_core.simulation.directory import run_schema
from fedmoe_core.simulation.directory.health import kept_budgets
from fedmoe_core.simulation.directory.seal import changed_since


@dataclass(frozen=True)
class Run:
    """One run directory, read.

    Attributes:
        path: the directory.
        name: what people call it, unique among the runs that are shown together.
        summary: summary.json, or what the records still tell of a run that did not finish.
        config: the resolved configuration as a tree of tables.
        rounds: round records in order, round 0 (before training) first.
        clients: client records in order of round and client.
        ledger: ledger lines in order of round and client.
        partition: which client holds what data, or None.
        finished: whether summary.json is there.
        changed: files that are not what they were when the run ended.
    """

    path: Path
    name: str
    summary: Mapping[str, Any]
    config: Mapping[str, Any]
    rounds: Sequence[Mapping[str, Any]]
    clients: Sequence[Mapping[str, Any]]
    ledger: Sequence[Mapping[str, Any]]
    partition: Mapping[str, Any] | None
    finished: bool
    changed: tuple[str, ...] = ()

    @property
    def budgeted(self) -> bool:
        return bool(self.summary.get("budgeted", True))

    @property
    def violations(self) -> int:
        """Times that a client needed more than its device can bear, bound by a budget or not."""
        return int(self.summary.get("budget_violations") or 0)

    @property
    def broken(self) -> int:
        """Times that a client used more than the budget that bound it."""
        return int(self.summary.get("budgets_broken", self.violations if self.budgeted else 0) or 0)

    @property
    def nothing_trained(self) -> str:
        """Why no training entered the model; empty where some did."""
        return str(self.summary.get("nothing_trained") or "")

    @property
    def has_accuracy(self) -> bool:
        return show.known(self.summary.get("accuracy_after"))

    @property
    def plain(self) -> bool:
        """Whether the run trained a plain torch model, which has no experts."""
        return bool(self.summary.get("task") == "plain")

    def personal(self, kind: str, *, first: bool = False) -> list[float]:
        """Return ``loss`` or ``accuracy`` of every client's own model, last evaluated (or first); empty if never."""
        return [value for value in self.last(f"personal_{kind}_C", first=first) or () if show.known(value)]

    @property
    def seed(self) -> int:
        return int(self.summary.get("seed", self.config.get("seed", 0)))

    @property
    def traffic(self) -> float | None:
        """Bytes moved both ways."""
        down, up = self.summary.get("bytes_down"), self.summary.get("bytes_up")
        return None if down is None or up is None else float(down + up)

    @property
    def virtual_seconds(self) -> float | None:
        """Virtual time of the whole run; None where it has no clock."""
        seconds = self.summary.get("virtual_seconds", self.last("virtual_seconds_total"))
        return seconds if show.known(seconds) else None

    @property
    def privacy(self) -> str | None:
        """What the rounds have spent, and why it was the last where privacy ended the run; None without noise."""
        epsilon = self.summary.get("epsilon", self.last("epsilon"))
        if not show.known(epsilon):
            return None
        delta = self.summary.get("delta", (self.config.get("privacy") or {}).get("delta"))
        said = f"epsilon {show.number(epsilon)} at delta {delta:g}" if show.known(delta) else f"epsilon {epsilon:.3f}"
        return said + (f"; {why}" if (why := self.summary.get("stopped")) else "")

    @property
    def late(self) -> list[tuple[int, int, float]]:
        """Round, client and virtual seconds of every update that came after the deadline."""
        return [(r["round"], item["client"], item["seconds"]) for r in self.rounds for item in r.get("late") or ()]

    @cached_property
    def client_ids(self) -> list[int]:
        """Clients that are known of, grouped by tier (tiers in order of appearance), ascending within a tier."""
        tiers = self.tiers
        order = {tier: place for place, tier in enumerate(dict.fromkeys(tiers.values()))}
        known = set(tiers) | set(range(len((self.partition or {}).get("clients", []))))
        return sorted(known, key=lambda c: (order.get(tiers.get(c, ""), len(order)), c))

    @cached_property
    def tiers(self) -> Mapping[int, str]:
        """Tier of each client that took part, ascending; where the records differ, that of its last round."""
        last = {record["client"]: record.get("tier") or "" for record in self.clients}
        return {client: last[client] for client in sorted(last)}

    def client_name(self, client: int) -> str:
        names = (self.partition or {}).get("clients", [])
        return str(names[client]) if client < len(names) else f"client {client}"

    def last(self, key: str, *, first: bool = False) -> Any:
        """Return a value of the last (or first) round record that has it."""
        for record in self.rounds if first else reversed(self.rounds):
            if record.get(key) is not None:
                return record[key]
        return None


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read the runs in these directories, each under its own name.

    Raises:
        ValueError: no run there, nothing recorded yet, or a file that holds what no run writes.
        OSError: a file cannot be read.
    """
    runs = [_read(Path(path)) for path in paths]
    names = [run.name for run in runs]
    seeds = {run.seed for run in runs}
    unique: list[Run] = []
    for run in runs:
        name = run.name
        if names.count(name) > 1:
            twins = [other for other in runs if other.name == name]
            by_seed = len(seeds) > 1 and len({twin.seed for twin in twins}) == len(twins)
            name = f"{name}, seed {run.seed}" if by_seed else f"{name}, {visible(run.path.name)}"
        unique.append(replace(run, name=name))
    return unique


def _read(path: Path) -> Run:
    if not path.is_dir():
        raise ValueError(f"{path} is not a directory; give the directory of a run")
    if not (path / "metrics.jsonl").is_file():
        raise ValueError(f"{path} holds no run (no metrics.jsonl); give the directory that a run named as out")
    judged, answered = run_schema.read_metrics(path / "metrics.jsonl")
    rounds, clients = _latest(judged, "round"), _latest(answered, "round", "client")
    if not rounds:
        raise ValueError(f"{path}/metrics.jsonl has no round yet; let the run finish a round first")
    config = run_schema.read_config(path / "config.toml") if (path / "config.toml").is_file() else {}
    finished = (path / "summary.json").is_file()
    told = run_schema.read_ledger(path / "ledger.jsonl") if (path / "ledger.jsonl").is_file() else []
    ledger = _latest(told, "round", "client")
    if finished:
        summary = run_schema.read_summary(path / "summary.json")
    else:
        summary = _summary_so_far(config, rounds) | _kept(ledger, path / "ledger.jsonl")
    algorithm = summary.get("algorithm") or config.get("algorithm") or "run"
    return Run(
        path=path,
        name=str(summary.get("label") or title_of(algorithm)),
        summary=summary,
        config=config,
        rounds=rounds,
        clients=clients,
        ledger=ledger,
        partition=run_schema.read_partition(path / "partition.json") if (path / "partition.json").is_file() else None,
        finished=finished,
        changed=changed_since(path) if finished else (),
    )


def _kept(ledger: Sequence[Mapping[str, Any]], path: Path) -> dict[str, Any]:
    try:
        return kept_budgets(ledger)
    except ValueError as error:  # a limit that no budget has
        raise ValueError(f"{path}: {error}") from None


def _summary_so_far(config: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first, last = rounds[0], rounds[-1]
    own = last.get("personal_loss_C")
    losses = [value for value in last.get("loss_clients") or own or () if show.known(value)]
    return {
        "algorithm": config.get("algorithm"),
        "seed": config.get("seed", 0),
        "rounds": last["round"],
        "loss_before": first.get("loss") if first["round"] == 0 else None,
        "loss_after": last.get("loss"),
        "accuracy_before": first.get("accuracy") if first["round"] == 0 else None,
        "accuracy_after": last.get("accuracy"),
        "worst_client_loss": max(losses, default=None),
        "personal_loss_C": own,
        "personal_accuracy_C": last.get("personal_accuracy_C"),
        "bytes_down": last.get("bytes_down_total"),
        "bytes_up": last.get("bytes_up_total"),
        "flops": last.get("flops_total"),
    }


def _latest(records: Sequence[Mapping[str, Any]], *keys: str) -> list[Mapping[str, Any]]:
    """Records in order of ``keys``; of two for the same place (a resumed run) the later one counts."""
    kept = {tuple(int(record[key]) for key in keys): record for record in records}
    return [kept[place] for place in sorted(kept)]
