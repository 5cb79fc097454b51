"""What a run, or several, came to: the lines for the terminal, an honest verdict, and the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from fedmoe_core.base import show
from fedmoe_core.reporting.run import Run, differences

LEVEL = 0.0005  # differences below this vanish in the three digits that are printed


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
    parts.append(f"worst client {show.number(summary.get('worst_client_loss'))}")
    down, up = show.size(summary.get("bytes_down")), show.size(summary.get("bytes_up"))
    parts.append(f"moved {show.size(run.traffic)} (down {down}, up {up})")
    parts.append(f"experts held {held(run)}")
    if run.broken or run.budgeted:
        parts.append(f"budgets exceeded: {run.broken}{_first(summary.get('broken_by'))}")
    if not run.budgeted:
        parts.append(f"not bound by the budgets{_first(summary.get('over_budget'))}")
    if summary.get("refused_updates"):
        parts.append(f"updates refused: {summary['refused_updates']}")
    if not run.finished:
        parts.append(f"unfinished after round {summary.get('rounds')}")
    return ", ".join(parts)


def _first(over: Sequence[str] | None) -> str:
    """In brackets, which client needed more than its limits allow and by how much, and how many more there are."""
    if not over:
        return ""
    others = f"; {show.plural(len(over) - 1, 'more client')}" if len(over) > 1 else ""
    return f" ({over[0]}{others})"


def held(run: Run) -> str:
    """Return the fewest and the most experts that a client held, such as ``8..12``."""
    low, high = run.summary.get("experts_held_min"), run.summary.get("experts_held_max")
    if low is None or high is None:
        return show.NONE
    return f"{low}" if low == high else f"{low}..{high}"


def compare(runs: Sequence[Run]) -> list[str]:
    """Write one sentence per method against the first; runs of one method that differ only in seed count together."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        settings = {key: value for key, value in run.config.items() if key not in ("seed", "out", "cache", "ranks")}
        method = str(run.summary.get("label") or run.summary.get("algorithm"))
        groups.setdefault(repr((method, sorted(settings.items()))), []).append(run)
    subject, *others = groups.values()
    return [_verdict(subject, other) for other in others]


def _verdict(mine: Sequence[Run], theirs: Sequence[Run]) -> str:
    pairs = [(a, b) for a in mine for b in theirs if a.seed == b.seed][: max(len(mine), len(theirs))]
    pairs = pairs or [(mine[0], theirs[0])]
    name, other = _group_name(mine), _group_name(theirs)
    unlike = [key for key in differences(*pairs[0]) if key != "seed"]
    if any(key in ("data", "corpus", "model", "partition", "clients", "eval.sequences") for key in unlike):
        return f"{name} and {other} cannot be compared: they differ in {', '.join(unlike)}."
    for run in (*mine, *theirs):
        if not run.finished:
            return f"{name} and {other} cannot be compared yet: {run.name} is unfinished."
        if run.nothing_trained:
            return f"{name} and {other} cannot be compared: nothing trained in {run.name} ({run.nothing_trained})."
        if run.broken:
            return f"{name} and {other} cannot be compared: {run.name} exceeded {show.plural(run.broken, 'budget')}."
    figure = judged_by([run for pair in pairs for run in pair])
    found = [(figure.of(a), figure.of(b)) for a, b in pairs]
    values = [(float(a), float(b)) for a, b in found if a is not None and b is not None]
    if len(values) < len(pairs):
        return f"{name} and {other} cannot be compared: a held-out figure is missing."
    seeds_differ = any(a.seed != b.seed for a, b in pairs)
    rest = [key for key in unlike if key != "budgets"] + (["seed"] if seeds_differ else [])
    also = f"; they also differ in {', '.join(rest)}" if rest else ""
    starts = [float(run.summary.get("loss_before") or "nan") for run in pairs[0]]
    if abs(starts[0] - starts[1]) > LEVEL and not seeds_differ:
        also += f"; they did not start level ({show.number(starts[0])} and {show.number(starts[1])})"
    if figure.personal:
        also = f", on their clients' own models{also}"
    return f"{_sentence(name, other + _terms(mine[0], theirs[0], unlike), values, accurate=figure.accurate)}{also}."


@dataclass(frozen=True)
class Criterion:
    """What a comparison goes by: accuracy or loss, of the global models or of the clients' own on average."""

    accurate: bool
    personal: bool

    def of(self, run: Run) -> float | None:
        kind = "accuracy" if self.accurate else "loss"
        if self.personal:
            own = run.personal(kind)
            return fmean(own) if own else None
        value = run.summary.get(f"{kind}_after")
        return value if show.known(value) else None


def judged_by(runs: Sequence[Run]) -> Criterion:
    """Return the first figure that all of these runs have: systems of local gates have no global model to judge."""
    order = [Criterion(True, False), Criterion(False, False), Criterion(True, True), Criterion(False, True)]
    return next((figure for figure in order if all(figure.of(run) is not None for run in runs)), order[1])


def _terms(a: Run, b: Run, unlike: Sequence[str]) -> str:
    if not b.budgeted:
        return ", which no budget binds"
    if not a.budgeted:
        return ", though no budget binds it"
    return " under different budgets" if "budgets" in unlike else " under the same budgets"


def _sentence(name: str, other: str, values: Sequence[tuple[float, float]], *, accurate: bool) -> str:
    """Say which run ends where; ahead means lower loss or higher accuracy, on the mean over the seeds."""
    a, b = fmean(x for x, _ in values), fmean(y for _, y in values)
    sign = 1 if accurate else -1
    wins = sum(sign * (x - y) > 0 for x, y in values)
    seeds = "one seed" if len(values) == 1 else f"mean of {len(values)} seeds, ahead in {wins}"
    text = show.share if accurate else show.number
    figures = f"({text(a)} against {text(b)}, {seeds})"
    gap = f"{100 * abs(a - b):.1f} points of accuracy" if accurate else f"{abs(a - b):.3f} nats"
    side = "above" if a > b else "below"
    if abs(a - b) < LEVEL:
        return f"{name} did not beat {other}: they end level {figures}"
    if sign * (a - b) > 0:
        return f"{name} ends {gap} {side} {other} {figures}"
    return f"{name} did not beat {other}: it ends {gap} {side} {figures}"


def _group_name(runs: Sequence[Run]) -> str:
    return runs[0].name.removesuffix(f", seed {runs[0].seed}") if len(runs) > 1 else runs[0].name


def ranking(runs: Sequence[Run]) -> list[tuple[int | None, Run, str]]:
    """Order runs from best to worst with their place; None and a reason where a run may not be ranked."""
    figure = judged_by(runs)

    def merit(run: Run) -> float:
        value = figure.of(run)
        return float("inf") if value is None else -value if figure.accurate else value

    fair: list[Run] = []
    apart: list[tuple[int | None, Run, str]] = []
    for run in runs:
        unlike = [key for key in differences(runs[0], run) if key != "seed"]
        if not run.finished:
            apart.append((None, run, "unfinished"))
        elif run.nothing_trained:
            apart.append((None, run, "nothing trained"))
        elif run.broken:
            apart.append((None, run, "exceeded a budget"))
        elif not run.budgeted:
            apart.append((None, run, "not bound by the budgets"))
        elif unlike:
            apart.append((None, run, f"differs in {', '.join(unlike)}"))
        elif merit(run) == float("inf"):
            apart.append((None, run, "no held-out figure"))
        else:
            fair.append(run)
    fair.sort(key=merit)
    return [*((place, run, "") for place, run in enumerate(fair, 1)), *sorted(apart, key=lambda item: merit(item[1]))]
