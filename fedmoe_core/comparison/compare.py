"""A comparison of systems under identical budgets: the runs, then one table, two figures and a JSON file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedmoe_core.base.files import write_whole
from fedmoe_core.base.show import plural
from fedmoe_core.comparison import figures
from fedmoe_core.comparison.jobs import Job, JobOutcome, other_runs, remaining, run_jobs
from fedmoe_core.comparison.run_figures import RunFigures, figures_of
from fedmoe_core.comparison.study import Study, write_record
from fedmoe_core.comparison.table import markdown, rows_of
from fedmoe_core.reporting.run import read_runs
from fedmoe_core.simulation.directory.claim import exclusive
from fedmoe_core.simulation.directory.health import problems
from fedmoe_core.simulation.directory.run_schema import read_summary

LOCK = "fedmoe-compare.lock"


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


def compare(study: Study, watch: Callable[[JobOutcome, float], None], *, force: bool = False) -> StudyResult:
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
    measured: dict[str, list[RunFigures]] = {}
    for job in done:
        (run,) = read_runs([job.out])
        measured.setdefault(job.variant.label, []).append(figures_of(run, job.variant.label))
    if not measured:
        return []
    if study.beside:
        measured |= study.runs_beside()
        subject = study.variants[0].label
        order = dict.fromkeys([subject, *study.beside.measured, *measured])
        measured = {label: measured[label] for label in order if label in measured}
    rows = rows_of(measured, target=study.target)
    lines = markdown(rows)
    write_record(study, measured, rows)
    write_whole(study.out / "table.md", "\n".join(lines) + "\n")
    for name, draw in (("tiers", figures.tiers), ("learning", figures.quality_by_traffic)):
        draw(measured).savefig(study.out / f"{name}.png", dpi=150)
    return lines
