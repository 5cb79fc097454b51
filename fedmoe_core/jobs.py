"""The runs of a comparison: which there are, which are done, and the processes that do the rest, stoppable at any time.

Every run is a run directory like any other, made by ``fedmoe simulate`` in a process of its own. So whatever ends
early, a worker, a seed or the whole comparison, takes nothing with it: the same command goes on from the checkpoints.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from fedmoe_core.config import Config
from fedmoe_core.names import concerns

KEPT = 2000  # characters of a failed run's last words that are worth keeping


@dataclass(frozen=True)
class Variant:
    """One contender: a label and the words that make it, such as ``("algorithm=hfedmoe", "selection.score=s")``."""

    label: str
    words: tuple[str, ...]

    @property
    def slug(self) -> str:
        """The label as a directory name."""
        return "".join(c if c.isalnum() or c in "-_." else "-" for c in self.label).strip("-.")


@dataclass(frozen=True)
class Job:
    """One run: a contender under one seed."""

    variant: Variant
    seed: int
    config: Config

    @property
    def out(self) -> Path:
        return Path(self.config.out)

    @property
    def name(self) -> str:
        return f"{self.variant.label}, seed {self.seed}"

    def finished(self) -> bool:
        """Whether this very run is on disk, whole."""
        return (self.out / "summary.json").is_file() and self._same()

    def begun(self) -> bool:
        """Whether this very run has a checkpoint to go on from."""
        return (self.out / "checkpoint").exists() and self._same()

    def _same(self) -> bool:
        try:
            differs = Config.load(self.out / "config.toml").diff(self.config)
        except (OSError, ValueError):
            return False
        return not any(concerns(key, [self.config.algorithm]) for key in differs)

    def command(self, words: Sequence[str]) -> list[str]:
        """The command line of this run: a resumption where that is possible, else the run from its start."""
        start = [sys.executable, "-m", "fedmoe_core.cli"]
        if self.begun():
            return [*start, "resume", str(self.out), "--quiet"]
        own = [*self.variant.words, f"seed={self.seed}", f"threads={self.config.threads}", f"out={self.out}"]
        return [*start, "simulate", *words, *own, "--quiet", "--force"]


@dataclass(frozen=True)
class Outcome:
    """How one job ended: ``error`` is empty when its summary is there."""

    job: Job
    seconds: float
    error: str = ""
    cached: bool = False


def make_jobs(
    words: Sequence[str], variants: Sequence[Variant], seeds: Sequence[int], *, out: Path, threads: int
) -> list[Job]:
    """All runs, every contender's first seed before anybody's second... but seeds vary fastest.

    So the first processes to start have different seeds, and each makes the warm-up that its seed's later runs read.

    Args:
        words: what the contenders share: a configuration file and ``key=value`` words.
        variants: the contenders; labels and directory names must differ.
        seeds: of every contender.
        out: the comparison's directory; runs lie in ``out/runs/CONTENDER/seed-N``.
        threads: of every process.

    Raises:
        ValueError: a word that no configuration knows, two contenders of one name, or no seed.
    """
    if not seeds or not variants:
        raise ValueError("a comparison needs at least one system and one seed; name them")
    slugs = [variant.slug for variant in variants]
    for slug in slugs:
        if not slug or slugs.count(slug) > 1:
            raise ValueError(f"two systems are called {slug!r}; give each a label of its own")
    jobs = []
    for variant in variants:
        config = config_of(words, variant.words)
        for seed in seeds:
            place = out / "runs" / variant.slug / f"seed-{seed}"
            jobs.append(Job(variant, seed, replace(config, seed=seed, out=str(place), threads=threads)))
    return jobs


def config_of(words: Sequence[str], own: Sequence[str] = ()) -> Config:
    """The configuration that shared words (a TOML file among them, if any) and a contender's own make.

    Raises:
        ValueError, OSError: as ``Config.load``.
    """
    files, shared = [w for w in words if w.endswith(".toml")], [w for w in words if not w.endswith(".toml")]
    return Config.load(Path(files[0]) if files else None, [*shared, *own])


def run_jobs(
    jobs: Sequence[Job], words: Sequence[str], *, workers: int, watch: Callable[[Outcome, float], None]
) -> list[Outcome]:
    """Do what is not done yet, ``workers`` processes at a time; a failed run is an outcome, never the end of the rest.

    Args:
        jobs: as ``make_jobs`` gives them.
        words: the shared words that ``make_jobs`` was given.
        workers: most processes at a time.
        watch: told of every outcome, finished ones from disk first, with the seconds that the rest may still take.

    Raises:
        KeyboardInterrupt: after the running processes have been stopped; their checkpoints stay.
    """
    outcomes = [Outcome(job, 0.0, cached=True) for job in jobs if job.finished()]
    waiting = [job for job in jobs if not job.finished()]
    for outcome in outcomes:
        watch(outcome, float("nan"))
    took: list[float] = []
    with _children() as running:
        while waiting or running:
            while waiting and len(running) < workers:
                job = waiting.pop(0)
                job.out.parent.mkdir(parents=True, exist_ok=True)
                running[_start(job, words)] = (job, time.monotonic())
            for process in [process for process in running if process.poll() is not None]:
                job, began = running.pop(process)
                took.append(time.monotonic() - began)
                outcome = Outcome(job, took[-1], _error(job, process))
                outcomes.append(outcome)
                watch(outcome, sum(took) / len(took) * (len(waiting) + len(running) / 2) / workers)
            time.sleep(0.2)
    order = {job.out: place for place, job in enumerate(jobs)}
    return sorted(outcomes, key=lambda outcome: order[outcome.job.out])


def remaining(jobs: Sequence[Job]) -> list[Job]:
    """The jobs without a finished run."""
    return [job for job in jobs if not job.finished()]


def _start(job: Job, words: Sequence[str]) -> subprocess.Popen[bytes]:
    # Its own log, not a pipe: a pipe that nobody empties would stop a talkative child.
    log = job.out.parent / f"{job.out.name}.log"
    environment = {**os.environ, "OMP_NUM_THREADS": str(job.config.threads)}
    with log.open("wb") as sink:
        return subprocess.Popen(job.command(words), stdout=sink, stderr=sink, stdin=subprocess.DEVNULL, env=environment)


def _error(job: Job, process: subprocess.Popen[bytes]) -> str:
    """Why there is no summary: the run's own last line, or the signal that killed it."""
    if job.finished():
        return ""
    if process.returncode < 0:
        return f"killed by {signal.Signals(-process.returncode).name}"
    log = job.out.parent / f"{job.out.name}.log"
    text = log.read_text("utf-8", "replace")[-KEPT:].strip() if log.is_file() else ""
    last = text.splitlines()[-1] if text else "it said nothing"
    return last.removeprefix("error: ")


@contextmanager
def _children() -> Iterator[dict[subprocess.Popen[bytes], tuple[Job, float]]]:
    """Running processes; none outlives the comparison, however it ends."""
    running: dict[subprocess.Popen[bytes], tuple[Job, float]] = {}
    try:
        yield running
    finally:
        for process in running:
            process.terminate()
        for process in running:
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()


def parse_seeds(text: str) -> tuple[int, ...]:
    """``0-7``, ``0,2,5`` or a mixture.

    Raises:
        ValueError: something else.
    """
    seeds: list[int] = []
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        if not low.isdigit() or (dash and not high.isdigit()):
            raise ValueError(f"seeds {text!r} are not a list; write 0-7 or 0,1,2")
        seeds += range(int(low), int(high or low) + 1)
    if len(set(seeds)) != len(seeds) or not seeds:
        raise ValueError(f"seeds {text!r} name none or one twice; write 0-7 or 0,1,2")
    return tuple(seeds)


def parse_variants(systems: Sequence[str], named: Mapping[str, Sequence[str]]) -> list[Variant]:
    """Contenders by name: a label of ``named`` (a file's table of words), else an algorithm."""
    return [
        Variant(system, tuple(named[system]) if system in named else (f"algorithm={system}",)) for system in systems
    ]
