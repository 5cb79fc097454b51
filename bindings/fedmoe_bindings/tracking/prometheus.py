"""The sink ``prometheus``: the last round's figures in a small file, for node_exporter's textfile collector."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedmoe_core.base.files import write_whole
from fedmoe_core.base.wording import visible
from fedmoe_core.simulation.sinks.figures import OF_THE_LINE, RECKONED, figures_of
from fedmoe_core.simulation.sinks.sink import Sink

MEANINGS = {
    **OF_THE_LINE,
    **RECKONED,
    "round": "rounds on record",
    "rounds": "rounds that the run will have",
    "finished": "1 once the run has ended well",
    "updated_seconds": "Unix time of this file",
    "tier_loss": "held-out loss of the clients of a budget, mean",
    "tier_worst_client_loss": "held-out loss of the client of a budget that is worst off",
    "tier_accuracy": "held-out accuracy of the clients of a budget, mean",
}


class PrometheusSink(Sink):
    """Replaces its file after each round, whole or not at all; a round that is told twice leaves what it left before.

    The format is Prometheus' text exposition format 0.0.4. Totals are counters, all else are gauges. A figure is
    absent where the last round has none, as its loss between evaluations.
    """

    def last_told(self, first_round: int) -> int:
        return first_round - 1  # a run with no round left to play still has a last one

    def on_round(self, round: int, rounds: int, record: Mapping[str, Any]) -> None:
        self._write(round, rounds, record, finished=False)
        self._last = (round, rounds, record)

    def on_end(self, summary: Mapping[str, Any]) -> None:
        self._write(*self._last, finished=True)

    def _write(self, round: int, rounds: int, record: Mapping[str, Any], *, finished: bool) -> None:
        found = figures_of(record, self.config)
        values = {"round": round, "rounds": rounds, "finished": int(finished), "updated_seconds": time.time()}
        lines = [line for name, value in {**values, **found.values}.items() for line in self._lines(name, {"": value})]
        for name in dict.fromkeys(name for tier in found.tiers.values() for name in tier):
            by_tier = {tier: figures[name] for tier, figures in found.tiers.items() if name in figures}
            lines += self._lines(f"tier_{name}", by_tier)
        out = Path(self.config.out)
        write_whole(Path(self.config.watch.prometheus or out / "metrics.prom"), "\n".join([*lines, ""]))

    def _lines(self, name: str, values: Mapping[str, float]) -> Iterator[str]:
        """One metric: what it is, its type, and a sample for each tier; the tier "" is the run."""
        yield f"# HELP fedmoe_{name} {MEANINGS[name]}"
        yield f"# TYPE fedmoe_{name} {'counter' if name.endswith('_total') else 'gauge'}"
        for tier, value in values.items():
            labels = {"run": self.config.out, "algorithm": self.config.algorithm, **({"tier": tier} if tier else {})}
            said = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
            yield f"fedmoe_{name}{{{said}}} {float(value)!r}"


def _escaped(text: str) -> str:
    return visible(text).replace("\\", "\\\\").replace('"', '\\"')
