"""What a run came to: the line for the terminal, the figure it is read by, and how runs of one page differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from fedmoe_core.base import show
from fedmoe_core.config.run_config import Config
from fedmoe_core.config.systems import concerns
from fedmoe_core.reporting.run import Run

# Facts that the configuration only names, by their digests in the summary.
SOURCES = (("corpus", "corpus_sha256"), ("model weights", "model_sha256"))


def line(run: Run) -> str:
    """Write one line: whether anything trained, loss before and after, worst client, traffic, experts, budgets."""
    summary = run.summary
    before, after = summary.get("loss_before"), summary.get("loss_after")
    idle = f"nothing trained ({run.nothing_trained}), " if run.nothing_trained else ""
    parts = [f"{run.name}: {idle}held-out loss {show.number(before)} -> {show.number(after)}"]
    if own := run.personal("loss"):
        parts.append(f"clients' own models {show.number(fmean(own))}")
    if own := run.personal("accuracy"):
        parts.append(f"their accuracy {show.share(fmean(own))}")
    if run.has_accuracy:
        accuracy = summary.get("accuracy_before"), summary.get("accuracy_after")
        parts.append(f"accuracy {show.share(accuracy[0])} -> {show.share(accuracy[1])}")
    if not run.plain:  # which is judged on test rows of all
        parts.append(f"worst client {show.number(summary.get('worst_client_loss'))}")
    down, up = show.size(summary.get("bytes_down")), show.size(summary.get("bytes_up"))
    parts.append(f"moved {show.size(run.traffic)} (down {down}, up {up})")
    if not run.plain:
        parts.append(f"experts held {held(run)}")
    if run.broken or run.budgeted:
        parts.append(f"budgets exceeded: {run.broken}{_first(summary.get('broken_by'))}")
    if not run.budgeted:
        parts.append(f"not bound by the budgets{_first(summary.get('over_budget'))}")
    if run.privacy is not None:
        parts.append(run.privacy)
    if run.virtual_seconds is not None:
        parts.append(f"virtual time {show.seconds(run.virtual_seconds)}")
    if "staleness_mean" in summary:
        parts.append(f"staleness of updates {staleness(run)}")
    if run.late:
        parts.append(f"updates too late: {len(run.late)}")
    if summary.get("refused_updates"):
        parts.append(f"updates refused: {summary['refused_updates']}")
    if said := guard_did(summary.get("guard")):
        parts.append(said)
    if "cohorts" in summary:
        parts.append(how_clients_ran(run))
    if not run.finished:
        parts.append(f"unfinished after round {summary.get('rounds')}")
    return ", ".join(parts)


def _first(over: Sequence[str] | None) -> str:
    """In brackets, which client needed more than its limits allow and by how much, and how many more there are."""
    if not over:
        return ""
    others = f"; {show.plural(len(over) - 1, 'more client')}" if len(over) > 1 else ""
    return f" ({over[0]}{others})"


def staleness(run: Run) -> str:
    """Say how many server steps old the models of a buffered run were, such as ``1.25 on average, 4 at most``."""
    summary = run.summary
    return f"{show.number(summary.get('staleness_mean'), 2)} on average, {summary.get('staleness_max')} at most"


def held(run: Run) -> str:
    """Return the fewest and the most experts that a client held, such as ``8..12``."""
    low, high = run.summary.get("experts_held_min"), run.summary.get("experts_held_max")
    if low is None or high is None:
        return show.NONE
    return f"{low}" if low == high else f"{low}..{high}"


def guard_did(told: Mapping[str, Any] | None) -> str:
    """Say what the guard of the sums did in a run, such as ``guard krum: 12 changes scaled down, 3 left out``."""
    if not told:
        return ""
    words = (
        ("bounded", "scaled down"),
        ("left_out", "left out"),
        ("few", "by too few clients for the rule"),
        ("below_quorum", "kept for want of a quorum"),
    )
    did = [f"{told[key]} {word}" for key, word in words if told.get(key)]
    rule = f" {told['rule']}" if told["rule"] != "none" else ""
    return f"guard{rule}: {', '.join(did) or 'nothing to do'}"


def how_clients_ran(run: Run) -> str:
    """Say how many client rounds ran in cohorts, and how many alone for which reason; empty where none was asked for.

    Such as ``80 client rounds in 16 cohorts, 4 alone (its trunk trains)``.
    """
    together, alone = run.summary.get("clients_in_cohorts"), run.summary.get("clients_alone") or {}
    if together is None:
        return ""
    said = f"{show.plural(together, 'client round')} in {show.plural(run.summary.get('cohorts') or 0, 'cohort')}"
    reasons = ", ".join(f"{reason}: {count}" if len(alone) > 1 else reason for reason, count in alone.items())
    return f"{said}, {sum(alone.values())} alone ({reasons})" if alone else said


@dataclass(frozen=True)
class Quality:
    """A figure that runs are read by: accuracy or loss, of the global models or of the clients' own on average."""

    accurate: bool
    personal: bool

    @property
    def name(self) -> str:
        kind = "held-out accuracy" if self.accurate else "held-out loss"
        return f"{kind} of the clients' own models" if self.personal else kind

    def text(self, value: float | None) -> str:
        """Show a value of this figure."""
        return show.share(value) if self.accurate else show.number(value)

    def of(self, run: Run, *, first: bool = False) -> float | None:
        """Return the figure at the end of a run, or at its start; None where it was not measured."""
        kind = "accuracy" if self.accurate else "loss"
        if self.personal:
            own = run.personal(kind, first=first)
            return fmean(own) if own else None
        value = run.summary.get(f"{kind}_{'before' if first else 'after'}")
        return value if show.known(value) else None

    def gain(self, run: Run) -> float | None:
        """Return how much better a run ended than it began; None where either was not measured."""
        start, end = self.of(run, first=True), self.of(run)
        if start is None or end is None:
            return None
        return end - start if self.accurate else start - end


QUALITIES = (Quality(True, False), Quality(False, False), Quality(True, True), Quality(False, True))


def quality_of(runs: Sequence[Run]) -> Quality:
    """Return the first quality that all of these runs have: systems of local gates have no global model."""
    return next((quality for quality in QUALITIES if all(quality.of(run) is not None for run in runs)), QUALITIES[1])


def by_quality(runs: Sequence[Run]) -> list[Run]:
    """Sort runs by how they ended, for a table to be read from its top; those without a figure come last."""
    quality = quality_of(runs)
    ends = {run.path: quality.of(run) for run in runs}

    def place(run: Run) -> float:
        end = ends[run.path]
        return float("inf") if end is None else -end if quality.accurate else end

    return sorted(runs, key=place)


def remarks(run: Run, first: Run) -> list[str]:
    """Say what a reader of one table has to know of a run: how it went, and what it does not share with the first."""
    found = [] if run.finished else ["unfinished"]
    found += ["nothing trained"] if run.nothing_trained else []
    found += ["exceeded a budget"] if run.broken else []
    found += [] if run.budgeted else ["not bound by the budgets"]
    if run is first:
        return found
    try:
        unlike = differences(first, run)
    except (OSError, ValueError):  # without a config.toml, or with one of another version
        return [*found, f"settings cannot be compared with those of {first.name}"]
    return [*found, f"differs from {first.name} in {', '.join(unlike)}"] if unlike else found


def differences(first: Run, second: Run) -> list[str]:
    """Return what two runs do not share, the system and the seed aside: settings that either reads, corpus, weights.

    Raises:
        ValueError, OSError: a run's configuration is not one of this version, or not there.
    """
    one, other = (Config.load(run.path / "config.toml") for run in (first, second))
    unlike = [key for key in one.diff(other) if key not in ("algorithm", "seed", "threads")]
    found = [key for key in unlike if concerns(key, (one.algorithm, other.algorithm))]
    for name, digest in SOURCES:
        mine, theirs = first.summary.get(digest), second.summary.get(digest)
        if mine is not None and theirs is not None and mine != theirs:
            found.append(name)
    return found


def changes(run: Run) -> list[str]:
    """Say in a sentence which files of a run were changed after its end; nothing where none was."""
    if not run.changed:
        return []
    return [f"{run.path}: {', '.join(run.changed)} changed after the run ended; this shows what lies there now"]


def note(runs: Sequence[Run]) -> str:
    """Say, where runs of several systems are shown, which command tests their differences; else nothing."""
    systems = {str(run.summary.get("label") or run.summary.get("algorithm")) for run in runs}
    return "" if len(systems) < 2 else "fedmoe report only shows runs; fedmoe compare tests differences over seeds."
