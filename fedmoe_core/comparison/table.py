"""From the runs of several systems to one table: means with intervals over seeds, tests, and a best that is earned."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import fmean

from fedmoe_core.base import show
from fedmoe_core.base.wording import visible
from fedmoe_core.comparison.run_figures import Burden, RunFigures, Spent
from fedmoe_core.comparison.significance import Comparison, MeanInterval, best_of, mean_interval


@dataclass(frozen=True)
class Quality:
    """One quality of one system over seeds: its mean and interval, the test against the subject, and whether it is
    significantly better than every other system's."""

    value: MeanInterval | None
    against_subject: Comparison | None
    best: bool


@dataclass(frozen=True, kw_only=True)
class Row(Burden):
    """One system; of its burden the means over seeds (ratios: extremes).

    Attributes:
        label, seeds, accuracy, budgeted: as in ``RunFigures``.
        qualities: by name: "global", "clients", "lower tiers" (the first half of them, each tier weighing the same),
            and "mean TIER" and "worst TIER" of every tier.
        to_target: seeds that reached the target, and the mean of what those had spent; None = none did.
        violations: times that a client needed more than its device can bear, all seeds together.
        broken: times that a client used more than the budget that bound it, all seeds together.
        idle: seeds in which nothing trained.
    """

    label: str
    seeds: tuple[int, ...]
    accuracy: bool
    budgeted: bool
    qualities: Mapping[str, Quality]
    reached: int
    to_target: Spent | None
    violations: int
    broken: int
    idle: int

    @property
    def remark(self) -> str:
        """What sets this system apart from those that may be best, in brackets; empty where nothing does."""
        if self.broken:
            return " (broke its budgets)"
        if self.idle:
            return f" (nothing trained in {show.plural(self.idle, 'seed')})"
        return "" if self.budgeted else " (not inside the budgets)"


def rows_of(measured: Mapping[str, Sequence[RunFigures]], *, target: float | None = None) -> list[Row]:
    """Make one row for each system, in the order given; the first is the subject of the tests.

    Systems that passed a budget, or did not train, are shown but are not candidates for best. Tests pair runs of equal
    seed.

    Args:
        measured: runs by label, every seed at most once.
        target: quality (mean over clients) whose price is told. None = for each seed, the midpoint of the best start
            and the best end of the systems inside the budgets, so that none of them is there without learning. Where no
            end is better than the best start, there is no target.
    """
    runs = {label: sorted(of_seed, key=lambda run: run.seed) for label, of_seed in measured.items()}
    first = next(iter(runs.values()))[0]
    goals = _half_way(runs) if target is None else {run.seed: target for of_seed in runs.values() for run in of_seed}
    qualities = {name: _judge(runs, read, more=first.accuracy) for name, read in _readers(first).items()}
    return [
        _row(label, of_seed, {name: q[label] for name, q in qualities.items()}, goals)
        for label, of_seed in runs.items()
    ]


def markdown(rows: Sequence[Row]) -> list[str]:
    """Write the table in Markdown: qualities, then prices. Bold: significantly better than every other bound system."""
    scale, digits = (100.0, 1) if rows[0].accuracy else (1.0, 3)
    names = list(rows[0].qualities)
    unit = "accuracy, %" if rows[0].accuracy else "held-out loss, nats"
    lines = [
        f"Quality ({unit}): mean ± half of the 95 % interval over seeds; bold only where better than every other "
        f"system inside the budgets (paired t and Wilcoxon, Holm, 5 %); * differs from {_name(rows[0].label)}.",
        "",
        _line(["system", "seeds", *map(_name, names)]),
        _line(["---"] * (2 + len(names))),
    ]
    for row in rows:
        name = _name(row.label) + row.remark
        cells = [_quality(row.qualities[n], scale, digits) for n in names]
        lines.append(_line([name, str(len(row.seeds)), *cells]))
    held = list(rows[0].tier_held)
    timed = any(row.spent.virtual_seconds is not None for row in rows)
    heads = ["system", "reached target", "rounds", "moved", "FLOPs", "time", *(["virtual time"] if timed else [])]
    heads += ["moved in all", "peak predicted", "measured", "ratio", *(f"experts, {_name(tier)}" for tier in held)]
    heads += ["load CV", "router mass lost", "over budget"]
    lines += ["", _line(heads), _line(["---"] * len(heads))]
    for row in rows:
        lines.append(_line(_prices(row, held, timed=timed)))
    return lines


def _readers(first: RunFigures) -> dict[str, Callable[[RunFigures], float | None]]:
    lower = list(first.tier_mean)[: len(first.tier_mean) // 2]
    readers: dict[str, Callable[[RunFigures], float | None]] = {
        "global": lambda run: run.whole,
        "clients": lambda run: run.clients,
    }
    if lower:
        readers["lower tiers"] = lambda run: fmean(run.tier_mean[tier] for tier in lower)
    readers |= {f"mean {name}": lambda run, name=name: run.tier_mean[name] for name in first.tier_mean}  # type: ignore[misc]
    readers |= {f"worst {name}": lambda run, name=name: run.tier_worst[name] for name in first.tier_mean}  # type: ignore[misc]
    return readers


def _judge(
    runs: Mapping[str, Sequence[RunFigures]], read: Callable[[RunFigures], float | None], *, more: bool
) -> dict[str, Quality]:
    known = {
        label: {run.seed: value for run in of_seed if (value := read(run)) is not None}
        for label, of_seed in runs.items()
    }
    subject = next(iter(runs))
    bound = [label for label, of_seed in runs.items() if known[label] and all(run.fair for run in of_seed)]
    verdict = best_of({label: known[label] for label in bound}, more=more)
    tests = Comparison.family(known[subject], {label: v for label, v in known.items() if label != subject and v})
    return {
        label: Quality(
            mean_interval(list(known[label].values())) if known[label] else None, tests.get(label), label == verdict
        )
        for label in runs
    }


def _half_way(runs: Mapping[str, Sequence[RunFigures]]) -> dict[int, float]:
    """Return, by seed, the midpoint of best start and best end of systems inside the budgets (all, if none is).

    A seed in which no end is better than the best start has none: the best start would be there before round 1.
    """
    bound = [of_seed for of_seed in runs.values() if all(run.fair for run in of_seed)]
    every = [run for of_seed in bound or runs.values() for run in of_seed]
    best = max if every[0].accuracy else min
    goals = {}
    for seed in {run.seed for of_seed in runs.values() for run in of_seed}:
        alike = [run for run in every if run.seed == seed] or every
        start, end = best(run.start for run in alike), best(run.clients for run in alike)
        if end != start and best(start, end) == end:
            goals[seed] = (start + end) / 2
    return goals


def _row(label: str, runs: Sequence[RunFigures], qualities: Mapping[str, Quality], goals: Mapping[int, float]) -> Row:
    aims = [(run, goals[run.seed]) for run in runs if run.seed in goals]
    reached = [spent for run, goal in aims if (spent := run.to_target(goal)) is not None]
    lost = [run.lost_mass for run in runs if run.lost_mass is not None]
    return Row(
        label=label,
        seeds=tuple(run.seed for run in runs),
        accuracy=runs[0].accuracy,
        budgeted=all(run.budgeted for run in runs),
        qualities=qualities,
        reached=len(reached),
        to_target=_mean_spent(reached) if reached else None,
        spent=_mean_spent([run.spent for run in runs]),
        peak_predicted=fmean(run.peak_predicted for run in runs),
        peak_measured=fmean(run.peak_measured for run in runs),
        peak_ratio=(min(run.peak_ratio[0] for run in runs), max(run.peak_ratio[1] for run in runs)),
        tier_held={tier: fmean(run.tier_held[tier] for run in runs) for tier in runs[0].tier_held},
        load_cv=fmean(run.load_cv for run in runs),
        lost_mass=fmean(lost) if lost else None,
        violations=sum(run.violations for run in runs),
        broken=sum(run.broken for run in runs),
        idle=sum(not run.trained for run in runs),
    )


def _mean_spent(spent: Sequence[Spent]) -> Spent:
    told = {field.name: [getattr(one, field.name) for one in spent] for field in fields(Spent)}
    means = {name: None if None in values else fmean(values) for name, values in told.items()}
    return Spent(**{**means, "rounds": round(means["rounds"] or 0)})  # type: ignore[arg-type]


def _name(text: str) -> str:
    """Write a label or a tier so that Markdown shows it as it is: no HTML, no link, no cell's end; most stay the same.

    Underscores stay: inside a word they mean nothing, and names such as ``top_k`` are everywhere.
    """
    text = re.sub(r"\\(?=[!-/:-@\[-`{-~]|$)|[|`*\[\]]", r"\\\g<0>", visible(text))
    text = re.sub(r"&(?=#?\w+;)", "&amp;", text)
    return text.replace("<", "&lt;").replace(">", "&gt;")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _quality(quality: Quality, scale: float, digits: int) -> str:
    if quality.value is None:
        return show.NONE
    half = quality.value.half_width
    text = f"{quality.value.mean * scale:.{digits}f}"
    text += "" if math.isnan(half) else f" ± {half * scale:.{digits}f}"
    text += " *" if quality.against_subject is not None and quality.against_subject.significant else ""
    return f"**{text}**" if quality.best else text


def _prices(row: Row, tiers: Sequence[str], *, timed: bool) -> list[str]:
    at = row.to_target
    price = [show.NONE] * (5 if timed else 4)
    if at is not None:
        price = [str(at.rounds), show.size(at.bytes_moved), show.flops(at.flops), show.seconds(at.seconds)]
        price += [show.seconds(at.virtual_seconds)] if timed else []
    low, high = row.peak_ratio
    return [
        _name(row.label),
        f"{row.reached} of {len(row.seeds)}",
        *price,
        show.size(row.spent.bytes_moved),
        show.size(row.peak_predicted),
        show.size(row.peak_measured),
        f"{low:.2f} to {high:.2f}",
        *(f"{row.tier_held[tier]:.1f}" for tier in tiers),
        show.number(row.load_cv, 2),
        show.share(row.lost_mass),
        str(row.violations),
    ]
