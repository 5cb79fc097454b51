"""A comparison of systems under identical budgets: the runs, then one table, two figures and a JSON file."""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fedmoe_core import compare_figures
from fedmoe_core.compare_record import Earlier, write_record
from fedmoe_core.compare_table import markdown, rows_of
from fedmoe_core.config import usable_cores
from fedmoe_core.identity import Identity
from fedmoe_core.jobs import (
    Job,
    Outcome,
    Variant,
    config_of,
    make_jobs,
    other_runs,
    parse_seeds,
    parse_variants,
    remaining,
    run_jobs,
)
from fedmoe_core.measures import Measures, measure
from fedmoe_core.names import ALGORITHMS
from fedmoe_core.run_directory import exclusive
from fedmoe_core.run_schema import read_summary
from fedmoe_core.runs import read_runs
from fedmoe_core.show import plural
from fedmoe_core.verdicts import problems

__all__ = ["Study", "StudyResult", "compare"]
LOCK = "fedmoe-compare.lock"


@dataclass(frozen=True)
class Study:
    """What to compare.

    Attributes:
        words: a configuration file and ``key=value`` words that all systems share.
        variants: the systems; the first is the subject, which the others are tested against.
        seeds: of every system.
        out: the directory of the comparison.
        workers: most runs at once; every one gets its share of the cores.
        target: quality (mean over clients) that "to the target" means; None = by seed, midway from best start to end.
        beside: an earlier comparison under the same words; its other systems are shown in the table, not run again.
    """

    words: tuple[str, ...]
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]
    out: Path
    workers: int
    target: float | None = None
    beside: Earlier | None = None

    @classmethod
    def of(
        cls,
        words: Sequence[str],
        *,
        systems: str,
        seeds: str,
        out: Path,
        workers: int = 0,
        target: float | None = None,
        variants: Path | None = None,
        beside: Path | None = None,
    ) -> Study:
        """Make a study from the command line's words.

        Args:
            words: shared by all systems.
            systems: names separated by commas: algorithms, or labels of ``variants``; "all" is every algorithm.
            seeds: such as ``0-7``.
            out, target: as the attributes.
            workers: 0 = one for every two cores.
            variants: a TOML file with a table ``[systems]`` of labels, each a list of words.
            beside: the ``compare.json`` of an earlier comparison.

        Raises:
            ValueError: a system that is neither an algorithm nor a label, no seed, or an earlier comparison
                that cannot be shown with this one.
            OSError: a file cannot be read.
        """
        named: Mapping[str, Any] = {}
        if variants is not None:
            named = tomllib.loads(variants.read_text("utf-8")).get("systems", {})
        every = list(named) if named else list(ALGORITHMS)
        chosen = every if systems == "all" else [name.strip() for name in systems.split(",") if name.strip()]
        study = cls(
            tuple(words),
            tuple(parse_variants(chosen, named)),
            parse_seeds(seeds),
            out,
            workers or max(1, usable_cores() // 2),
            target,
            Earlier.read(beside) if beside else None,
        )
        if study.beside:
            study.beside.runs(study)  # refuses here, not after hours of runs
        return study

    @property
    def threads(self) -> int:
        """Threads of each run: the cores divided by the workers."""
        return max(1, usable_cores() // self.workers)

    @cached_property
    def identity(self) -> Identity:
        """Digests of the data, the model and the code that all systems share, as they are now."""
        return Identity.of(config_of(self.words))

    def jobs(self) -> list[Job]:
        """List all runs of the study."""
        return make_jobs(self.words, self.variants, self.seeds, out=self.out, threads=self.threads)


@dataclass(frozen=True)
class StudyResult:
    """What came of a study.

    Attributes:
        missing: runs that have not finished.
        problems: sentences about finished runs that failed all the same: budgets broken, nothing trained.
        lines: the table; none while a system has no finished run.
        notes: what a reader of the table should know besides.
    """

    missing: Sequence[Job]
    problems: Sequence[str]
    lines: Sequence[str]
    notes: Sequence[str]


def compare(study: Study, watch: Callable[[Outcome, float], None], *, force: bool = False) -> StudyResult:
    """Run what is missing, then write ``compare.json``, ``table.md`` and the figures from what is there.

    Args:
        study: what to compare.
        watch: told of every run that ends, with the seconds that the rest may still take.
        force: replace runs that were made under other settings, from other data, or by other code.

    Raises:
        ValueError, OSError: one sentence with the remedy; finished runs stay.
    """
    study.out.mkdir(parents=True, exist_ok=True)
    jobs = study.jobs()
    with exclusive(study.out, LOCK):
        again = set(others := other_runs(jobs))
        if others and not force:
            more = f" (and {len(others) - 1} more)" if len(others) > 1 else ""
            raise ValueError(f"{next(iter(others.values()))}{more}; choose another --out, or replace it with --force")
        if force:
            again |= {job.out for job in jobs if job.finished() and job.other_code()}
        outcomes = run_jobs(jobs, study.words, workers=study.workers, watch=watch, again=again)
        done = [outcome.job for outcome in outcomes if not outcome.error]
        return StudyResult(remaining(jobs), failed(done), write(study, done), other_code(study, jobs))


def failed(done: Sequence[Job]) -> list[str]:
    """Say which of the finished runs broke a budget or trained nothing."""
    summaries = {job.out: read_summary(job.out / "summary.json") for job in done}
    return [f"{out}: {problem}" for out, summary in summaries.items() for problem in problems(summary)]


def other_code(study: Study, jobs: Sequence[Job]) -> list[str]:
    """Say which finished runs in a study's table were made by other code than this."""
    own = study.identity.code
    made = Counter(code for job in jobs if job.finished() and (code := job.other_code()))
    notes = [
        f"{plural(count, 'run')} of this table came from fedmoe {code}, and this is {own}; --force runs them again"
        for code, count in made.items()
    ]
    if study.beside and study.beside.identity.code != own:
        notes.append(f"{study.beside.path} came from fedmoe {study.beside.identity.code}, and this is {own}")
    return notes


def write(study: Study, done: Sequence[Job]) -> list[str]:
    """Write everything that finished runs can tell; return the table's lines."""
    measured: dict[str, list[Measures]] = {}
    for job in done:
        (run,) = read_runs([job.out])
        measured.setdefault(job.variant.label, []).append(measure(run, job.variant.label))
    if not measured:
        return []
    if study.beside:
        measured |= study.beside.runs(study)
        subject = study.variants[0].label
        order = dict.fromkeys([subject, *study.beside.measured, *measured])
        measured = {label: measured[label] for label in order if label in measured}
    rows = rows_of(measured, target=study.target)
    lines = markdown(rows)
    write_record(study, measured, rows)
    (study.out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name, draw in (("tiers", compare_figures.tiers), ("learning", compare_figures.learning)):
        draw(measured).savefig(study.out / f"{name}.png", dpi=150)
    return lines
