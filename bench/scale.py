"""What many clients and ranks cost: seconds a round beside the training, memory and files, from 10 to 10,000 clients.

    python -m bench.scale [--clients 10 100 1000 10000] [--ranks 1 2 4] [--long 1000 50 100] [--out FILE]

Every row is a run of the real command in processes of its own, on made-up text, with the demo's model and short
batches (8 sequences of 16 tokens, 5 steps). As many clients train in a round whatever their number is. All clients are
judged before the first round and after the last one alone, and that time is a column of its own. `--long` is one run of
so many clients, rounds, and clients a round, in cohorts of 8.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.common.checkout import RESULTS, command, environment
from bench.common.machine import machine

BATCH, TOKENS, STEPS = 8, 16, 5
A_ROUND = 8  # clients in a round of the first tables
ROUNDS = 7
TEXTS = 4  # of each client, about
SMALL = ("model_config.hidden_size=32", "model_config.head_dim=8", "model_config.expert_width=16")


def write_corpus(path: Path, clients: int) -> Path:
    """Write some texts for every client, in words drawn from 400."""
    draw = np.random.default_rng(0)
    words = ["".join(draw.choice(list("aeioukrstmnp"), 5)) for _ in range(400)]
    with path.open("w") as file:
        for _ in range(400 + 2 * TEXTS * clients):
            file.write(json.dumps({"text": " ".join(draw.choice(words, 40))}) + "\n")
    return path


def run(clients: int, place: Path, *words: str, small: bool, cores: int) -> dict[str, Any]:
    """Run the command once and read what it left."""
    corpus = place / f"texts-{clients}.jsonl"
    if not corpus.exists():
        write_corpus(corpus, clients)
    out = Path(tempfile.mkdtemp(dir=place)) / "run"
    settings = [
        f"data=jsonl:{corpus}",
        f"out={out}",
        f"cache={place / 'cache'}",
        f"clients={clients}",
        "partition=iid",
        "budgets=['experts=25%', 'experts=50%']",
        "model_config.vocab_size=512",
        "warmup.steps=20",
        f"train.batch_size={BATCH}",
        f"train.seq_len={TOKENS}",
        f"train.local_steps={STEPS}",
        *(SMALL if small else ()),
        *words,
    ]
    began = time.perf_counter()
    process = subprocess.Popen(
        command("fedmoe_core.cli", "simulate", *settings, "--quiet"),
        env=environment(OMP_NUM_THREADS=str(cores)),
        stdout=subprocess.DEVNULL,
    )
    _, status, used = os.wait4(process.pid, 0)  # of the largest of the process and those it started
    process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - began
    if process.returncode:
        raise SystemExit(f"{clients} clients ended with {process.returncode}; its words are above")
    return figures(out, wall) | {"clients": clients, "peak_rss_bytes": used.ru_maxrss * 1024, "settings": settings[3:]}


def figures(out: Path, wall: float) -> dict[str, Any]:
    """Read the costs of a run from what it wrote; a first round, which warms caches, is left out."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rounds = [line for line in lines if line["type"] == "round"]
    later = rounds[2:] or rounds[1:]
    judged = [line["evaluate_seconds"] for line in rounds if "evaluate_seconds" in line]
    summary = json.loads((out / "summary.json").read_text())
    answers = sum(line["type"] == "client" for line in lines)
    return {
        "wall_seconds": wall,
        "before_the_first_round_seconds": wall - sum(line["seconds"] for line in rounds),
        "round_seconds": statistics.median(line["seconds"] - line.get("evaluate_seconds", 0.0) for line in later),
        "engine_seconds": statistics.median(line["engine_seconds"] for line in later),
        "evaluate_seconds": statistics.median(judged),
        "evaluations": len(judged),
        "rounds": len(rounds) - 1,
        "client_rounds": answers,
        "refused": summary["refused_updates"],
        "model_hash": summary["model_hash"],
        "loss_before": summary["loss_before"],
        "loss_after": summary["loss_after"],
        "log_bytes_a_client_round": sum((out / name).stat().st_size for name in ("metrics.jsonl", "ledger.jsonl"))
        / answers,
        "checkpoint_bytes": sum(file.stat().st_size for file in (out / "checkpoint").iterdir()),
        "partition_bytes": (out / "partition.json").stat().st_size,
        "report_bytes": (out / "report.html").stat().st_size,
    }


def show(title: str, rows: list[dict[str, Any]], first: str) -> Table:
    """Put rows into a table."""
    columns = (first, "a round", "of it engine", "judging all", "before round 1", "peak", "checkpoint", "report")
    table = Table(*columns, title=title)
    for row in rows:
        times = (f"{row[f'{name}_seconds']:.3f} s" for name in ("round", "engine", "evaluate"))
        sizes = (f"{row[name] / 1e6:,.1f} MB" for name in ("peak_rss_bytes", "checkpoint_bytes", "report_bytes"))
        table.add_row(f"{row[first]:,}", *times, f"{row['before_the_first_round_seconds']:.0f} s", *sizes)
    return table


def keep(report: dict[str, Any], out: Path) -> None:
    """Write what is known so far: the tables take half an hour, and an end midway should not cost them all."""
    out.write_text(json.dumps(report, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=__doc__)
    parser.add_argument("--clients", type=int, nargs="*", default=[10, 100, 1000, 10000])
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--long", type=int, nargs="*", default=[1000, 50, 100], help="clients, rounds, clients a round")
    parser.add_argument("--small", action="store_true", help="a narrower model, to try the command")
    parser.add_argument("--out", type=Path, default=None, help="default: bench/results/scale-cpu-DATE.json")
    chosen = parser.parse_args(arguments)
    known, cores = machine(), len(os.sched_getaffinity(0))
    sparse = (f"rounds={ROUNDS}", f"eval.every={ROUNDS}")
    report: dict[str, Any] = {"machine": known | {"cores": cores}, "clients_a_round": A_ROUND}
    console = Console(width=130)
    out = chosen.out or RESULTS / f"scale-cpu-{known['date']}.json"
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        own = {"small": chosen.small, "cores": cores}
        report["clients"] = [
            run(count, place, *sparse, f"clients_per_round={min(A_ROUND, count)}", **own) for count in chosen.clients
        ]
        console.print(show(f"clients known, {A_ROUND} of them in a round, one rank", report["clients"], "clients"))
        keep(report, out)
        share = (*sparse, "clients_per_round=16", "threads=1")
        report["ranks"] = [
            run(100, place, *share, f"ranks={count}", **own) | {"ranks": count} for count in chosen.ranks
        ]
        if len({row["model_hash"] for row in report["ranks"]}) > 1:
            raise SystemExit("the ranks came to different models; no time is worth reporting")
        console.print(show("ranks, 16 of 100 clients in a round, one thread each", report["ranks"], "ranks"))
        keep(report, out)
        if chosen.long:
            clients, rounds, a_round = chosen.long
            words = (f"rounds={rounds}", f"clients_per_round={a_round}", "cohort.clients=8", "eval.every=10")
            report["long"] = run(clients, place, *words, **own)
            title = (
                f"{clients:,} clients x {rounds} rounds, {a_round} in a round: {report['long']['wall_seconds']:.0f} s"
            )
            console.print(show(title, [report["long"]], "clients"))
            keep(report, out)
    print(f"kept in {out}")


if __name__ == "__main__":
    main()
