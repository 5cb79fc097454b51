"""The runs of a comparison: which there are, which are done, and the processes that do the rest, stoppable at any time.

Every run is a run directory like any other, made by ``fedmoe simulate`` in a separate process. So whatever ends
early, a worker, a seed or the whole comparison, takes nothing with it: the same command goes on from the checkpoints.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from fedmoe_core.base.lifeline import Lifeline, lifeline
from fedmoe_core.base.wording import another_configuration
from fedmoe_core.config.run_config import Config
from fedmoe_core.config.systems import concerns
from fedmoe_core.simulation.directory.claim import read_facts, refuse_claim
from fedmoe_core.simulation.directory.seal import SUMMARY, changed_since
from fedmoe_core.simulation.identity import Identity
from fedmoe_core.simulation.launch import stop
from fedmoe_core.simulation.worlds.found_plain import code_of, plain_of, sources_of

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
        """Return whether this very run is on disk, whole."""
        return (self.out / SUMMARY).is_file() and self._same()

    def begun(self) -> bool:
        """Return whether this very run has a checkpoint to go on from, made by this very code."""
        return (self.out / "checkpoint").exists() and self._same() and not self.other_code()

    def differs(self) -> str:
        """Say which settings that count differ in the run on disk; empty where all agree or no run is there."""
        if read_facts(self.out) is None:
            return ""
        try:
            unlike = Config.load(self.out / "config.toml").diff(self.config)
        except (OSError, ValueError) as error:
            return f"a configuration that cannot be read ({error})"
        unlike = {key: pair for key, pair in unlike.items() if concerns(key, [self.config.algorithm])}
        return another_configuration(unlike) if unlike else ""

    def other_code(self) -> str:
        """Name the code that made the run on disk; empty where no run began, or where it is what would run now."""
        made = str((read_facts(self.out) or {}).get("code", ""))
        return "" if made == code_of(self.config, plain_of(self.config, None)) else made

    def _same(self) -> bool:
        return read_facts(self.out) is not None and not self.differs()

    def command(self, words: Sequence[str], *, afresh: bool = False) -> list[str]:
        """Return the command line of this run: a resumption where possible and not ``afresh``, else from its start."""
        start = [sys.executable, "-m", "fedmoe_core.cli"]
        if not afresh and self.begun():
            return [*start, "resume", str(self.out), "--quiet"]
        own = [*self.variant.words, f"seed={self.seed}", f"threads={self.config.threads}", f"out={self.out}"]
        return [*start, "simulate", *words, *own, "--quiet", "--force"]


@dataclass(frozen=True)
class JobOutcome:
    """How one job ended: ``error`` is empty when its summary is there."""

    job: Job
    seconds: float
    error: str = ""
    cached: bool = False


def make_jobs(
    words: Sequence[str], variants: Sequence[Variant], seeds: Sequence[int], *, out: Path, threads: int
) -> list[Job]:
    """List all runs, contender by contender; within a contender, seed by seed.

    The first processes to start have different seeds, and each makes the warm-up that its seed's later runs read.

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
            raise ValueError(f"two systems are called {slug!r}; give each its own label")
    jobs = []
    for variant in variants:
        config = config_of(words, variant.words)
        for seed in seeds:
            place = out / "runs" / variant.slug / f"seed-{seed}"
            jobs.append(Job(variant, seed, replace(config, seed=seed, out=str(place), threads=threads)))
    return jobs


def config_of(words: Sequence[str], own: Sequence[str] = ()) -> Config:
    """Make the configuration of shared words (a TOML file among them, if any) and a contender's own.

    Raises:
        ValueError, OSError: as ``Config.load``.
    """
    files, shared = [w for w in words if w.endswith(".toml")], [w for w in words if not w.endswith(".toml")]
    return Config.load(Path(files[0]) if files else None, [*shared, *own])


def run_jobs(
    jobs: Sequence[Job],
    words: Sequence[str],
    *,
    workers: int,
    watch: Callable[[JobOutcome, float], None],
    again: Collection[Path] = (),
) -> list[JobOutcome]:
    """Do what is not done yet, ``workers`` processes at once; a failed run is an outcome, never the end of the rest.

    Args:
        jobs: as ``make_jobs`` gives them.
        words: the shared words that ``make_jobs`` was given.
        workers: most processes at once.
        watch: told of every outcome, finished ones from disk first, with the seconds that the rest may still take.
        again: run directories in which the run starts again, finished or not.

    Raises:
        KeyboardInterrupt: after the running processes have been stopped; their checkpoints stay.
    """
    done = {job.out for job in jobs if job.out not in again and job.finished()}
    outcomes = [JobOutcome(job, 0.0, cached=True) for job in jobs if job.out in done]
    waiting = [job for job in jobs if job.out not in done]
    for outcome in outcomes:
        watch(outcome, float("nan"))
    took: list[float] = []
    with lifeline() as line, _children() as running:
        while waiting or running:
            while waiting and len(running) < workers:
                job = waiting.pop(0)
                job.out.parent.mkdir(parents=True, exist_ok=True)
                process = _start(job, words, line, afresh=job.out in again)
                running[process] = (job, time.monotonic())
            for process in [process for process in running if process.poll() is not None]:
                job, began = running.pop(process)
                took.append(time.monotonic() - began)
                outcome = JobOutcome(job, took[-1], _error(job, process))
                outcomes.append(outcome)
                watch(outcome, sum(took) / len(took) * (len(waiting) + len(running) / 2) / workers)
            time.sleep(0.2)
    order = {job.out: place for place, job in enumerate(jobs)}
    return sorted(outcomes, key=lambda outcome: order[outcome.job.out])


def other_runs(jobs: Sequence[Job]) -> dict[Path, str]:
    """Find runs where ``jobs`` go that do not count: other settings, data or model, or changed since they ended.

    Returns:
        One sentence by run directory.

    Raises:
        ValueError: a directory there holds something that fedmoe did not make.
        OSError: data or model cannot be read.
    """
    found: dict[Path, str] = {}
    today: dict[tuple[str, str, str], Identity] = {}
    for job in jobs:
        refuse_claim(job.out, force=True)
        facts = read_facts(job.out)
        if facts is None:
            continue
        if differs := job.differs():
            found[job.out] = f"{job.out} holds a run of {differs}"
            continue
        if changed := _changed(job.out):
            found[job.out] = f"{job.out} holds a run whose {changed} changed after it ended"
            continue
        sources = (job.config.adapter, job.config.data, job.config.model)
        if sources not in today:
            today[sources] = sources_of(job.config, plain_of(job.config, None))
        then = Identity.read(facts)
        try:
            if then is None:
                raise ValueError(f"{job.out} does not say which data it was made from")
            then.require_same_sources(today[sources], str(job.out), job.config)
        except ValueError as error:
            found[job.out] = str(error)
    return found


def _changed(out: Path) -> str:
    """Name what is not as it was when a finished run ended; empty where nothing is, or where no run ended."""
    if not (out / SUMMARY).is_file():
        return ""
    try:
        return ", ".join(changed_since(out))
    except ValueError:
        return SUMMARY


def remaining(jobs: Sequence[Job]) -> list[Job]:
    """Return the jobs without a finished run."""
    return [job for job in jobs if not job.finished()]


def _start(job: Job, words: Sequence[str], line: Lifeline, *, afresh: bool) -> subprocess.Popen[bytes]:
    # Its own log, not a pipe: a full pipe would stop a talkative child.
    log = job.out.parent / f"{job.out.name}.log"
    environment = {**os.environ, "OMP_NUM_THREADS": str(job.config.threads), **line.environment}
    with log.open("wb") as sink:
        return subprocess.Popen(
            job.command(words, afresh=afresh),
            stdout=sink,
            stderr=sink,
            stdin=subprocess.DEVNULL,
            env=environment,
            pass_fds=line.pass_fds,
            start_new_session=True,  # Ctrl-C reaches this process alone, which then stops each of them once
        )


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
        stop(list(running))


def parse_seeds(text: str) -> tuple[int, ...]:
    """Read seeds: ``0-7``, ``0,2,5`` or a mixture.

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
        raise ValueError(f"seeds {text!r} name no seed, or one twice; write 0-7 or 0,1,2")
    return tuple(seeds)


def parse_variants(systems: Sequence[str], named: Mapping[str, Sequence[str]]) -> list[Variant]:
    """Find contenders by name: a label of ``named`` (a file's table of words), else an algorithm."""
    return [
        Variant(system, tuple(named[system]) if system in named else (f"algorithm={system}",)) for system in systems
    ]
