"""Runs the job of other federated simulators in fedmoe, in a bare loop and in every peer at hand, and compares.

Peers live in environments of their own: name a Python for each, such as ``--flower ~/flower/bin/python``. No time is
reported of an engine whose losses differ from the bare loop's in the fourth digit.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.common.checkout import RESULTS, environment
from bench.common.machine import about
from bench.fedavg.job import JOBS, LR, Job

QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}
SETTLED = 2  # rounds left out of the median: the first pays for lazy imports
FACTS = ("cpu", "torch", "python", "commit", "date")  # of the machine, for the record
EXACT = 3  # rounds whose losses agree in 4 digits; rounding in float32 then grows, to 5e-5 in 20 rounds of Flower's
PEERS = ("pfl", "flower", "blazefl")


@dataclass(frozen=True)
class Outcome:
    """One engine on one job.

    Attributes:
        losses, accuracies, seconds: of each round.
        first: seconds from the command to the end of the first round, which starts workers and imports lazily.
        pss_bytes: largest sum of proportional memory over its processes, sampled twice a second.
    """

    losses: list[float]
    accuracies: list[float]
    seconds: list[float]
    first: float
    pss_bytes: int

    @property
    def round(self) -> float:
        """Median seconds of a settled round."""
        return statistics.median(self.seconds[SETTLED:])


def command_of(engine: str, job: Job, chosen: argparse.Namespace, out: Path) -> list[str]:
    """Write the command of an engine."""
    ranks = str(chosen.ranks)
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", ranks]
    torchrun += ["--master-addr", "127.0.0.1", "--master-port", str(chosen.port), "-m"]
    if engine == "bare loop":
        return [sys.executable, *torchrun, "bench.fedavg.bare"]
    if engine == "fedmoe":
        words = [f"clients={job.clients}", f"rounds={job.rounds}", f"train.local_epochs={job.epochs}"]
        words += [f"train.lr={LR}", "train.clip=0", f"cohort.clients={chosen.cohort}", f"ranks={ranks}", "threads=1"]
        adapter = "adapter=bench.fedavg.job:adapter"
        return [sys.executable, "-m", "fedmoe_core.cli", "simulate", "-q", adapter, *words, f"out={out}", "--force"]
    python = getattr(chosen, engine)
    if engine == "pfl":
        return [python, *torchrun, "bench.fedavg.with_pfl"]
    return [python, "-m", f"bench.fedavg.with_{engine}", ranks]


def play(engine: str, job: Job, chosen: argparse.Namespace) -> Outcome:
    """Run an engine to its end."""
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "run", Path(folder) / "log"
        began, largest, first = time.time(), 0, None
        with log.open("w") as file:
            process = subprocess.Popen(
                command_of(engine, job, chosen, out),
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment(**QUIET, **job.environment(), OMP_NUM_THREADS="1"),
            )
            sampled = 0.0
            while process.poll() is None:
                if first is None and engine == "fedmoe":
                    first = next((time.time() for line in rounds_of(out) if line["round"] == 1), None)
                if time.time() - sampled > 0.5:
                    largest, sampled = max(largest, pss_of(process.pid)), time.time()
                time.sleep(0.02)
        text = log.read_text(errors="replace")
        if process.returncode:
            raise SystemExit(f"{engine} ended with status {process.returncode}:\n{text[-2000:]}")
        if engine == "fedmoe":
            lines = list(rounds_of(out))[1:]
            at = first or time.time()
        else:
            lines = [json.loads(line) for line in text.splitlines() if line.startswith('{"loss"')]
            at = lines[0]["at"]
    losses, accuracies, seconds = ([float(line[key]) for line in lines] for key in ("loss", "accuracy", "seconds"))
    return Outcome(losses, accuracies, seconds, at - began, largest)


def rounds_of(out: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of rounds that a run of fedmoe has written so far."""
    with suppress(OSError):
        for text in (out / "metrics.jsonl").read_text().splitlines():
            with suppress(ValueError):  # the last line may be half written
                if (line := json.loads(text))["type"] == "round":
                    yield line


def pss_of(root: int) -> int:
    """Sum the proportional memory of a process and all below it, in bytes."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            parents.setdefault(int(fields[1]), []).append(int(path.parent.name))
    family, waiting = [], [root]
    while waiting:
        family.append(waiting.pop())
        waiting += parents.get(family[-1], [])
    total = 0
    for pid in family:
        with suppress(OSError):
            words = Path(f"/proc/{pid}/smaps_rollup").read_text().split()
            total += int(words[words.index("Pss:") + 1]) * 1024
    return total


def compared(name: str, job: Job, engines: list[str], chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Play all engines on a job, in turn and repeatedly; return a row for each.

    Raises:
        SystemExit: an engine's losses differ from the bare loop's.
    """
    played: dict[str, list[Outcome]] = {engine: [] for engine in engines}
    for repeat in range(chosen.repeats):
        for engine in engines:
            print(f"{name}: {engine}, {repeat + 1} of {chosen.repeats}", file=sys.stderr, flush=True)
            played[engine].append(play(engine, job, chosen))
    floor = played["bare loop"][0].losses
    for engine, outcomes in played.items():
        for found in outcomes:
            apart = [abs(one - other) for one, other in zip(found.losses, floor, strict=True)]
            if max(apart[:EXACT]) > 5e-5 or max(apart) > 1e-3:
                raise SystemExit(
                    f"{engine} is {max(apart):.1e} from the bare loop on {name}; no time is worth reporting"
                )
    return [row_of(name, engine, outcomes, played["bare loop"]) for engine, outcomes in played.items()]


def row_of(name: str, engine: str, outcomes: list[Outcome], bare: list[Outcome]) -> dict[str, Any]:
    """Sum up the repeats of one engine: medians, and the ratio to the bare loop of the same run."""
    ratios = [one.round / other.round for one, other in zip(outcomes, bare, strict=True)]
    return {
        "job": name,
        "engine": engine,
        "round_seconds": statistics.median(found.round for found in outcomes),
        "times_the_bare_loop": statistics.median(ratios),
        "first_round_after_s": statistics.median(found.first for found in outcomes),
        "pss_bytes": max(found.pss_bytes for found in outcomes),
        "first_losses": [round(loss, 4) for loss in outcomes[0].losses[:3]],
        "repeats": [found.round for found in outcomes],
    }


def table_of(rows: list[dict[str, Any]], jobs: Mapping[str, Job], ranks: int) -> Table:
    """Lay out the rows."""
    sizes = "; ".join(
        f"{name}: {job.clients} clients, H {job.hidden}, {job.steps} steps of 32" for name, job in jobs.items()
    )
    table = Table(
        *("job", "engine", "seconds a round", "times the bare loop", "first round after", "memory"),
        title=f"FedAvg of an MLP 64-H-H-10 on {ranks} processes ({sizes})",
    )
    for row in rows:
        table.add_row(
            row["job"],
            row["engine"],
            f"{row['round_seconds']:.3f}",
            f"{row['times_the_bare_loop']:.2f}",
            f"{row['first_round_after_s']:.1f} s",
            f"{row['pss_bytes'] / 1e6:,.0f} MB",
        )
    return table


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(prog="python -m bench.fedavg.run", description=__doc__)
    parser.add_argument("--jobs", nargs="+", choices=list(JOBS), default=list(JOBS))
    parser.add_argument("--ranks", type=int, default=len(os.sched_getaffinity(0)), help="processes of every engine")
    parser.add_argument("--cohort", type=int, default=1, help="clients that fedmoe trains at once")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=0, help="of every job; default: its own number")
    parser.add_argument("--port", type=int, default=29531, help="of torchrun's rendezvous on this machine")
    for peer in PEERS:
        parser.add_argument(f"--{peer}", metavar="PYTHON", help=f"a Python that has {peer}")
    parser.add_argument("--out", type=Path, default=None, help="default: bench/results/fedavg-DATE.json")
    chosen = parser.parse_args(arguments)
    known = {name: fact for name, fact in about("cpu", tiny=False).items() if name in FACTS}
    jobs = {name: JOBS[name] for name in chosen.jobs}
    if chosen.rounds:
        jobs = {name: Job(**{**asdict(job), "rounds": chosen.rounds}) for name, job in jobs.items()}
    engines = ["bare loop", "fedmoe", *(peer for peer in PEERS if getattr(chosen, peer))]
    rows = [row for name, job in jobs.items() for row in compared(name, job, engines, chosen)]
    Console(width=120).print(table_of(rows, jobs, chosen.ranks))
    versions = {peer: version_of(getattr(chosen, peer), peer) for peer in engines if peer in PEERS}
    report = {"machine": known, "ranks": chosen.ranks, "cohort": chosen.cohort, "peers": versions}
    report |= {"jobs": {name: asdict(job) for name, job in jobs.items()}, "rows": rows}
    out = chosen.out or RESULTS / f"fedavg-{known['date']}.json"
    out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"kept in {out}")


def version_of(python: str, peer: str) -> str:
    """Ask an environment for the version of its peer."""
    package = {"flower": "flwr"}.get(peer, peer)
    code = f"from importlib.metadata import version; print(version({package!r}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
