"""Whether one system beats another over the same seeds: intervals, paired tests, Holm's correction, and what is bold.

A value that does not exist (a system without a global model has no global accuracy) is None or NaN, and so is every
number that would rest on it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

Values = Sequence[float | None]
Test = Literal["t", "wilcoxon"]


@dataclass(frozen=True)
class Interval:
    """A mean and its confidence interval; ``count`` values were there. NaN where too few were (none, or one)."""

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Verdict:
    """The best system of a column and how sure that is.

    Attributes:
        best: largest (or smallest) mean; None where no system has a value.
        bold: every other system with values is significantly worse after Holm's correction.
        p: each other system's corrected p-value against the best; NaN where it shares too few seeds with it.
    """

    best: str | None
    bold: bool
    p: dict[str, float]


def mean_interval(values: Values, *, confidence: float = 0.95) -> Interval:
    """Student's t interval of the mean over seeds."""
    there = _numbers(values)
    there = there[~np.isnan(there)]
    if not len(there):
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = float(there.mean())
    if len(there) == 1:
        return Interval(mean, math.nan, math.nan, 1)
    half = float(stats.t.ppf((1 + confidence) / 2, len(there) - 1) * there.std(ddof=1) / math.sqrt(len(there)))
    return Interval(mean, mean - half, mean + half, len(there))


def paired_p(first: Values, second: Values, *, test: Test = "t") -> float:
    """Two-sided p-value that two systems are equal, from their differences seed by seed.

    "t" is the paired t-test; "wilcoxon" the signed-rank test, exact where differences are distinct in size. Seeds that
    either lacks are left out. Fewer than two pairs: NaN. All differences 0: 1. With n pairs Wilcoxon's p cannot fall
    below 2 / 2^n: at 8 seeds .0078, which Holm's correction over seven or more rivals never lets under .05.

    Raises:
        ValueError: the two have different numbers of seeds, so that they cannot be paired.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} values cannot be paired with {len(second)}; give both systems the same seeds")
    difference = _numbers(first) - _numbers(second)
    difference = difference[~np.isnan(difference)]
    if len(difference) < 2:
        return math.nan
    if not difference.any():
        return 1.0
    if test == "wilcoxon":
        return float(stats.wilcoxon(difference).pvalue)
    error = float(difference.std(ddof=1)) / math.sqrt(len(difference))
    if error == 0:  # the same difference in every seed
        return 0.0
    return float(2 * stats.t.sf(abs(float(difference.mean())) / error, len(difference) - 1))


def holm(p_values: Values) -> list[float]:
    """Holm's step-down correction of a family of p-values; those that are n/a stay so and do not count.

    The i-th smallest of m is multiplied by m - i + 1, then none may be below a smaller one's, nor above 1.
    """
    p = _numbers(p_values)
    there = [int(place) for place in np.argsort(p, kind="stable") if not math.isnan(p[place])]
    corrected, floor = [math.nan] * len(p), 0.0
    for place, index in enumerate(there):
        floor = max(floor, min(1.0, (len(there) - place) * float(p[index])))
        corrected[index] = floor
    return corrected


def judge(
    column: Mapping[str, Values], *, higher_is_better: bool = True, level: float = 0.05, test: Test = "t"
) -> Verdict:
    """Which system is best by its mean, and whether it may be printed bold: best against each of the others, by Holm.

    Systems without a value are out. One system alone is best and not bold: it beats nobody. A system that shares too
    few seeds with the best for a test keeps the best from being bold. Ties in the mean go to the first.
    """
    means = {name: mean_interval(values).mean for name, values in column.items()}
    ranked = {name: mean for name, mean in means.items() if not math.isnan(mean)}
    if not ranked:
        return Verdict(None, False, {})
    best = max(ranked, key=lambda name: ranked[name] if higher_is_better else -ranked[name])
    rivals = [name for name in ranked if name != best]
    corrected = holm([paired_p(column[best], column[rival], test=test) for rival in rivals])
    bold = bool(rivals) and all(p < level for p in corrected)
    return Verdict(best, bold, dict(zip(rivals, corrected, strict=True)))


def _numbers(values: Values) -> np.ndarray:
    """Float64, NaN for None."""
    return np.array([math.nan if value is None else value for value in values], dtype=np.float64)
