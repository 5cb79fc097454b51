"""What one finished run is worth, as plain numbers: quality for all clients and for each tier, and what it cost.

Quality is accuracy where the task has classes (more is better), else held-out loss in nats (less is better).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from fedmoe_core.base import show
from fedmoe_core.reporting.run import Run


@dataclass(frozen=True)
class Spent:
    """What a run had used up at some round, the first included."""

    rounds: int
    bytes_moved: float
    flops: float
    seconds: float
    virtual_seconds: float | None = None  # by the clock of the devices; None where the run has none


@dataclass(frozen=True, kw_only=True)
class Burden:
    """What a run asked of its clients.

    Attributes:
        spent: at the end.
        peak_predicted, peak_measured: largest over clients and rounds, bytes.
        peak_ratio: smallest and largest of predicted / measured.
        tier_held: mean number of experts held, by tier.
        load_cv: coefficient of variation of the samples that train an expert, mean over layers and rounds.
        lost_mass: router mass on experts that the client did not hold, mean.
    """

    spent: Spent
    peak_predicted: float
    peak_measured: float
    peak_ratio: tuple[float, float]
    tier_held: Mapping[str, float]
    load_cv: float
    lost_mass: float | None


@dataclass(frozen=True, kw_only=True)
class RunFigures(Burden):
    """One run.

    Attributes:
        label, seed: which.
        accuracy: whether quality is accuracy; loss otherwise.
        start: quality of the warm model, mean over clients.
        whole: quality of the final global model; None where the system has none.
        clients: mean over clients, each with the model that it would deploy (its own sub-model and gate).
        tier_mean, tier_worst: the same by budget tier.
        curve: (spent, mean over clients) of every evaluated round, in order.
        budgeted: whether every client kept inside its budget; ``violations`` counts where not.
        broken: how often a client used more than the budget that bound it.
        trained: whether any training entered the model.
    """

    label: str
    seed: int
    accuracy: bool
    start: float
    whole: float | None
    clients: float
    tier_mean: Mapping[str, float]
    tier_worst: Mapping[str, float]
    curve: Sequence[tuple[Spent, float]]
    budgeted: bool
    violations: int
    broken: int = 0  # records of earlier versions know neither this
    trained: bool = True  # nor this

    @property
    def fair(self) -> bool:
        """Whether this run may be called better than others: it trained, inside its budgets."""
        return self.budgeted and self.trained

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> RunFigures:
        """Rebuild the measures that ``dataclasses.asdict`` and JSON made of one.

        Raises:
            TypeError, ValueError, KeyError: they do not fit.
        """

        def number(value: float | None) -> float:
            return math.nan if value is None else float(value)  # JSON has no NaN

        curve = [(Spent(**spent), float(quality)) for spent, quality in record["curve"]]
        low, high = map(number, record["peak_ratio"])
        bare = {name: number(record[name]) for name in ("peak_predicted", "peak_measured", "load_cv")}
        return cls(**{**record, **bare, "curve": curve, "spent": Spent(**record["spent"]), "peak_ratio": (low, high)})

    def to_target(self, target: float) -> Spent | None:
        """Return what had been spent when the mean over clients first reached ``target``; None = never."""
        for spent, quality in self.curve:
            if quality >= target if self.accuracy else quality <= target:
                return spent
        return None


def figures_of(run: Run, label: str) -> RunFigures:
    """Return the measures of a finished run.

    Raises:
        ValueError: the run has not been evaluated after training.
    """
    accuracy = run.has_accuracy or any(r.get("accuracy_clients") or r.get("personal_accuracy_C") for r in run.rounds)
    kind = "accuracy" if accuracy else "loss"
    judged = [r for r in run.rounds if _clients(r, kind)]
    if len(judged) < 2:
        raise ValueError(f"{run.path} holds no evaluated round after the first; let it finish")
    last_C = _clients(judged[-1], kind)
    spent = [Spent(r["round"], _moved(r), r["flops_total"], _seconds(run, r["round"]), _virtual(r)) for r in judged]
    qualities = [fmean(_clients(r, kind)) for r in judged]
    tiers = {"test rows": [0]} if run.plain else _tiers(run, len(last_C))
    worst = min if accuracy else max
    peaks = [(line["predicted"]["memory_bytes"], line["real"]["memory_bytes"]) for line in run.ledger]
    peaks = [(predicted, real) for predicted, real in peaks if real]
    ratios = [predicted / real for predicted, real in peaks]
    return RunFigures(
        label=label,
        seed=run.seed,
        accuracy=accuracy,
        start=qualities[0],
        whole=judged[-1].get(kind),
        clients=qualities[-1],
        tier_mean={tier: fmean(last_C[c] for c in members) for tier, members in tiers.items()},
        tier_worst={tier: worst(last_C[c] for c in members) for tier, members in tiers.items()},
        curve=list(zip(spent, qualities, strict=True)),
        spent=spent[-1],
        peak_predicted=max((predicted for predicted, _ in peaks), default=float("nan")),
        peak_measured=max((real for _, real in peaks), default=float("nan")),
        peak_ratio=(min(ratios, default=float("nan")), max(ratios, default=float("nan"))),
        tier_held=_held(run, tiers),
        load_cv=math.nan if (load_cv := _mean(run, "load_cv")) is None else load_cv,
        lost_mass=_mean(run, "lost_mass"),
        budgeted=run.budgeted and not run.broken,
        violations=run.violations,
        broken=run.broken,
        trained=not run.nothing_trained,
    )


def _clients(record: Mapping[str, Any], kind: str) -> list[float]:
    """Each client's quality by its own model where the run measured it, else by the global model.

    A plain torch model is judged on test rows of all clients: one quality.
    """
    of_all = [record[kind]] if show.known(record.get(kind)) else []
    values = record.get(f"personal_{kind}_C") or record.get(f"{kind}_clients") or of_all
    return [float(value) for value in values]


def _mean(run: Run, key: str) -> float | None:
    """Average a figure of the round records; None where no round has it."""
    known = [record[key] for record in run.rounds if show.known(record.get(key))]
    return fmean(known) if known else None


def _moved(record: Mapping[str, Any]) -> float:
    return float(record["bytes_down_total"] + record["bytes_up_total"])


def _virtual(record: Mapping[str, Any]) -> float | None:
    seconds = record.get("virtual_seconds_total")
    return None if seconds is None else float(seconds)


def _seconds(run: Run, number: int) -> float:
    return float(sum(r["seconds"] for r in run.rounds if r["round"] <= number))


def _tiers(run: Run, clients: int) -> dict[str, list[int]]:
    """Members of each tier, in order of the configured budgets, which are dealt in turn."""
    budgets = list(run.config.get("budgets", [])) or [""]
    members: dict[str, list[int]] = {}
    for client in range(clients):
        members.setdefault(budgets[client % len(budgets)], []).append(client)
    return {tier: members[tier] for tier in dict.fromkeys(budgets) if tier in members}


def _held(run: Run, tiers: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """Experts held per client and round, by tier."""
    held: dict[int, list[int]] = {}
    for record in run.clients:
        held.setdefault(record["client"], []).append(int(np.sum(record["held_LE"])))
    return {
        tier: fmean(count for client in members for count in held.get(client, []))
        if any(map(held.get, members))
        else 0.0
        for tier, members in tiers.items()
    }
