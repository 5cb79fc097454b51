"""What a guard of the sums costs: a round of clients under each rule, its time and its peak memory.

    python -m bench.trust.guard [--clients 8 32] [--values 2000000] [--repeats 3] [--small] [--out FILE]

All clients train all experts of one layer. The rules take turns in every repeat; medians. "none" is the exact sums
alone, which hold no update. The peak is what torch holds while a round is added and closed, beside the sums.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from bench.common.checkout import RESULTS
from bench.common.machine import machine
from fedmoe_core.budget.limits import Budget, Cost
from fedmoe_core.budget.peak_memory import trace_memory
from fedmoe_core.messages.plan import ExpertPlan
from fedmoe_core.messages.update import ClientUpdate
from fedmoe_core.model.spec import ParamSpec
from fedmoe_core.server.accumulator import Accumulator
from fedmoe_core.server.guard.settings import Guard, Rule

EXPERTS = 16
SIZE = 1e-3  # of a delta


@dataclass(frozen=True)
class Crowd:
    """The answers of a round."""

    specs: tuple[ParamSpec, ...]
    answers: tuple[tuple[ClientUpdate, ExpertPlan], ...]

    @classmethod
    def of(cls, clients: int, values: int) -> Crowd:
        """Draw them: one tensor of so many values in all, in rows of one expert each."""
        specs = (ParamSpec("moe.0.w_in", "expert", (EXPERTS, values // EXPERTS), torch.float32, 0),)
        every = np.ones((1, EXPERTS), dtype=bool)
        answers = []
        for client in range(clients):
            plan = ExpertPlan(client, 0, every, every, 1, 1, 0, Budget(), Cost())
            delta = torch.randn(specs[0].shape, generator=torch.Generator().manual_seed(client)) * SIZE
            weights = 1.0 * every, 0.0 * every, 0.0, 1.0
            update = ClientUpdate(client, 0, plan.id, {"moe.0.w_in": delta}, *weights, None, Cost(), 1, steps=1)
            answers.append((update, plan))
        return cls(specs, tuple(answers))

    def played(self, rule: Rule) -> Accumulator:
        """Add all and close."""
        sums = Accumulator(self.specs, guard=Guard(rule=rule))
        for update, plan in self.answers:
            outcome = sums.add(update, plan)
            if not outcome.accepted:
                raise SystemExit(f"{outcome.reason}; no time is worth reporting")
        sums.close()
        return sums


def measured(clients: int, values: int, repeats: int) -> list[dict[str, Any]]:
    """Median seconds and peak bytes of every rule."""
    crowd, seconds = Crowd.of(clients, values), dict[Rule, list[float]]()
    for turn in range(repeats + 1):
        for rule in get_args(Rule):
            start = time.perf_counter()
            crowd.played(rule)
            if turn:
                seconds.setdefault(rule, []).append(time.perf_counter() - start)
    rows = []
    for rule, spent in seconds.items():
        _, trace = trace_memory(lambda rule=rule: crowd.played(rule), torch.device("cpu"))  # type: ignore[misc]
        row = {"clients": clients, "values": values, "rule": rule, "median_s": statistics.median(spent)}
        rows.append({**row, "peak_bytes": trace.peak - 8 * values, "load": os.getloadavg()[0]})
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(prog="python -m bench.trust.guard", description=__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--values", type=int, default=2_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="a few numbers, to try the command")
    parser.add_argument("--out", type=Path, default=None, help="default: bench/results/trust/guard-cpu-DATE.json")
    chosen = parser.parse_args(arguments)
    known, values = machine(), 320 if chosen.small else chosen.values
    rows = [row for clients in chosen.clients for row in measured(clients, values, chosen.repeats)]
    table = Table("clients", "rule", "s a round", "ms a client", "MB beside the sums", title=f"{values:,} numbers each")
    for row in rows:
        each = 1e3 * row["median_s"] / row["clients"]
        cells = (
            str(row["clients"]),
            row["rule"],
            f"{row['median_s']:.3f}",
            f"{each:.1f}",
            f"{row['peak_bytes'] / 1e6:.0f}",
        )
        table.add_row(*cells)
    Console(width=100).print(table)
    out = chosen.out or RESULTS / "trust" / f"guard-cpu-{known['date']}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"machine": known, "rows": rows}, indent=1) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
