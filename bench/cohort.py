"""Clients that train at once against one after another, on the demo's model: client rounds per second, and memory.

    python -m bench.cohort [--clients 8 16 32] [--tokens 16 32 128] [--repeats 5] [--threads 2] [--out FILE]

Both ways do all that a round does to a client: cut its sub-model out, train, watch the memory, read the deltas off.
They take turns in every repeat. Before any time is reported the deltas of both have been compared. Clients hold a
quarter and a half of the experts in turn; the trunk is frozen; a batch has 8 sequences.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.common.checkout import RESULTS
from bench.common.machine import machine
from fedmoe_core.config.run_config import Config
from fedmoe_core.server.state import ServerState
from fedmoe_core.simulation.cohorts.cutting import Group
from fedmoe_core.simulation.cohorts.grouping import grouped
from fedmoe_core.simulation.cohorts.training import answers
from fedmoe_core.simulation.observer import NullObserver
from fedmoe_core.simulation.prepare import build_world
from fedmoe_core.simulation.process_group import Ranks
from fedmoe_core.simulation.world import World

BATCH, STEPS = 8, 5
# Of a client's deltas, relative: what rounding in float32 comes to after a few steps of AdamW.
CLOSE = 1e-3
SMALL = ("model_config.hidden_size=32", "model_config.head_dim=8", "model_config.expert_width=16")


def world_of(clients: int, tokens: int, chosen: argparse.Namespace) -> World:
    """A run of so many clients with batches of 8 sequences of so many tokens, on an untrained model."""
    words = [
        f"clients={clients}",
        "budgets=['experts=25%', 'experts=50%']",
        *("warmup.steps=0", "selection.explore=0", "cohort.clients=0", "cohort.memory=64GiB"),
        *(f"train.batch_size={BATCH}", f"train.seq_len={tokens}", f"train.local_steps={STEPS}"),
        *(f"threads={chosen.threads}", f"device={chosen.device}", f"cache={chosen.cache}"),
        *(SMALL if chosen.small else ()),
    ]
    return build_world(Config.load(None, words).resolved(), Ranks(device=torch.device(chosen.device)), NullObserver())


def played(world: World, state: ServerState, groups: list[Group]) -> tuple[float, list[dict[str, Tensor]], int]:
    """Train groups; seconds, every client's deltas, and the largest peak of a cohort in bytes."""
    began, deltas, peak = time.perf_counter(), [], 0
    for group in groups:
        for answer in answers(world, state, group):
            if answer.update.status != "ok":
                raise SystemExit(f"client {answer.plan.client} failed: {answer.update.error}")
            deltas.append(answer.update.deltas)
            peak = max(peak, answer.memory_bytes)
    return time.perf_counter() - began, deltas, peak


def compared(clients: int, tokens: int, chosen: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of one round of the clients both ways."""
    world = world_of(clients, tokens, chosen)
    state = world.algorithm.init(world.params)
    plans = world.algorithm.plan(state, range(clients))
    together = grouped(world, plans)
    if len(together) != 1:
        raise SystemExit(f"{clients} clients fell into {len(together)} groups; they should be one cohort")
    alone = [Group((plan,)) for plan in plans]
    ways = {"one by one": alone, "together": together}
    found = {name: played(world, state, groups) for name, groups in ways.items()}
    apart = max(
        float((one - other).norm() / one.norm().clamp(min=1e-12))
        for mine, theirs in zip(found["one by one"][1], found["together"][1], strict=True)
        for one, other in ((mine[key], theirs[key]) for key in mine)
    )
    if not apart < CLOSE:
        raise SystemExit(f"the deltas of {clients} clients differ by {apart:.1e}; no time is worth reporting")
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(chosen.repeats):
        for name, groups in ways.items():
            seconds[name].append(played(world, state, groups)[0])
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "clients": clients,
        "tokens_of_a_sequence": tokens,
        "client_rounds_per_s": {name: clients / value for name, value in median.items()},
        "seconds": {name: sorted(values) for name, values in seconds.items()},
        "times_as_fast": median["one by one"] / median["together"],
        "largest_relative_difference": apart,
        "peak_bytes": found["together"][2],
        "predicted_bytes": together[0].predicted_bytes,
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(prog="python -m bench.cohort", description=__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 32, 128], help="of a sequence")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", help="cpu, or cuda:0")
    parser.add_argument("--small", action="store_true", help="a narrower model, to try the command")
    parser.add_argument("--out", type=Path, default=None, help="default: bench/results/cohort-DEVICE-DATE.json")
    chosen = parser.parse_args(arguments)
    known = machine()
    with tempfile.TemporaryDirectory() as cache:
        chosen.cache = cache
        rows = [compared(clients, tokens, chosen) for tokens in chosen.tokens for clients in chosen.clients]
    kind = "cpu" if chosen.device == "cpu" else torch.cuda.get_device_name(chosen.device)
    report = {"machine": known, "device": kind, "batch": BATCH, "local_steps": STEPS, "rows": rows}
    columns = ("clients", "tokens", "one by one", "together", "times as fast", "peak", "predicted")
    table = Table(*columns, title=f"client rounds per second on {kind}, batches of {BATCH}, median")
    for row in rows:
        rate = row["client_rounds_per_s"]
        memory = (f"{row[name] / 1e6:,.0f} MB" for name in ("peak_bytes", "predicted_bytes"))
        cells = (f"{rate[name]:.1f}" for name in ("one by one", "together"))
        table.add_row(
            str(row["clients"]), str(row["tokens_of_a_sequence"]), *cells, f"{row['times_as_fast']:.2f}", *memory
        )
    Console(width=110).print(table)
    out = chosen.out or RESULTS / f"cohort-{kind.replace(' ', '-').lower()}-{known['date']}.json"
    out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"kept in {out}")


if __name__ == "__main__":
    main()
