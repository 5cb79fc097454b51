"""The logs of a run against its state: every round once, every client's lines in both, as many as it was visited."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from fedmoe_core.server.state import ServerState
from fedmoe_core.simulation.directory.run_schema import read_ledger, read_metrics
from fedmoe_core.simulation.directory.standing import AFRESH


def require_history(out: Path, state: ServerState) -> None:
    """Refuse logs that do not tell how the run came to ``state``.

    Their digests are checked before; this finds a checkpoint of another round, or one whose digests were made again.

    Raises:
        ValueError: a line is not of our form, or the logs, the rounds and the visits do not agree.
    """
    judged, answered = read_metrics(out / "metrics.jsonl")
    entries = read_ledger(out / "ledger.jsonl")
    if [line["round"] for line in judged] != list(range(state.round + 1)):
        raise ValueError(f"{out}/metrics.jsonl does not have each round up to {state.round} once; {AFRESH}")
    if [(e["round"], e["client"]) for e in entries] != [(line["round"], line["client"]) for line in answered]:
        raise ValueError(f"{out}/ledger.jsonl does not have the clients of metrics.jsonl; {AFRESH}")
    visits = Counter(entry["client"] for entry in entries)
    if dict(visits) != {client: count for client, count in enumerate(state.visits) if count}:
        raise ValueError(f"{out}/checkpoint counts other visits of clients than ledger.jsonl; {AFRESH}")
