"""Whether one system is really better than another: intervals, paired tests over seeds, and Holm's correction."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

LEVEL = 0.05


@dataclass(frozen=True)
class MeanInterval:
    """A mean and half the width of its 95 % confidence interval (Student's t); NaN half width for one value."""

    mean: float
    half_width: float
    count: int


def mean_interval(values: Sequence[float]) -> MeanInterval:
    """Return the mean of at least one value, with its interval."""
    array = np.asarray(values, dtype=float)
    if len(array) < 2:
        return MeanInterval(float(array.mean()), math.nan, len(array))
    half = stats.t.ppf(1 - LEVEL / 2, len(array) - 1) * array.std(ddof=1) / math.sqrt(len(array))
    return MeanInterval(float(array.mean()), float(half), len(array))


@dataclass(frozen=True)
class Comparison:
    """Paired tests of one system against another over the seeds that both have.

    Attributes:
        difference: mean of other minus subject.
        pairs: number of seeds.
        t_p, wilcoxon_p: two-sided p values, corrected over the family; NaN with fewer than two pairs.
        family_size: tests that the correction covers.
    """

    difference: float
    pairs: int
    t_p: float
    wilcoxon_p: float
    family_size: int = 1

    @property
    def wilcoxon_reaches(self) -> bool:
        """Whether ranks alone could reach 5 %: n pairs give p >= 2^(1 - n), and Holm multiplies that by the family."""
        return self.family_size * 2.0 ** (1 - self.pairs) < LEVEL

    @property
    def significant(self) -> bool:
        """Whether t is below 5 %, and Wilcoxon too where it can be (8 seeds: families of up to 6)."""
        return self.t_p < LEVEL and (self.wilcoxon_p < LEVEL or not self.wilcoxon_reaches)

    @staticmethod
    def family(subject: Mapping[int, float], others: Mapping[str, Mapping[int, float]]) -> dict[str, Comparison]:
        """Test every other system against the subject; p values are corrected over all of them. Values by seed."""
        single = {label: paired(subject, values) for label, values in others.items()}
        t_p = holm([one.t_p for one in single.values()])
        rank_p = holm([one.wilcoxon_p for one in single.values()])
        return {
            label: replace(one, t_p=t, wilcoxon_p=rank, family_size=len(single))
            for (label, one), t, rank in zip(single.items(), t_p, rank_p, strict=True)
        }


def paired(subject: Mapping[int, float], other: Mapping[int, float]) -> Comparison:
    """Run uncorrected paired t and Wilcoxon signed-rank tests over common seeds."""
    seeds = sorted(set(subject) & set(other))
    gaps = np.array([other[seed] - subject[seed] for seed in seeds], dtype=float)
    if len(gaps) < 2:
        return Comparison(float(gaps.mean()) if len(gaps) else math.nan, len(gaps), math.nan, math.nan)
    if np.all(gaps == gaps[0]):  # no spread: t divides by zero; equality proves nothing, a constant gap everything
        p = 1.0 if gaps[0] == 0 else 0.0
        rank_p = 1.0 if gaps[0] == 0 else float(stats.wilcoxon(gaps).pvalue)
        return Comparison(float(gaps[0]), len(gaps), p, rank_p)
    return Comparison(
        float(gaps.mean()), len(gaps), float(stats.ttest_1samp(gaps, 0.0).pvalue), float(stats.wilcoxon(gaps).pvalue)
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Apply Holm's step-down correction (Holm 1979): p values that may be read at the level of the whole family.

    NaN stays NaN and is not counted.
    """
    known = sorted((p, place) for place, p in enumerate(p_values) if not math.isnan(p))
    corrected = [math.nan] * len(p_values)
    highest = 0.0
    for rank, (p, place) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - rank) * p))
        corrected[place] = highest
    return corrected


def best_of(values: Mapping[str, Mapping[int, float]], *, more: bool) -> str | None:
    """Return the system that is significantly better than every other one; None if no system is.

    Args:
        values: by system and seed; at least one value each.
        more: whether larger is better.
    """
    if len(values) < 2:
        return None
    means = {label: float(np.mean(list(of_seed.values()))) for label, of_seed in values.items()}
    leader = (max if more else min)(means, key=means.__getitem__)
    others = {label: of_seed for label, of_seed in values.items() if label != leader}
    beaten = Comparison.family(values[leader], others)
    return leader if all(one.significant for one in beaten.values()) else None
