"""Intervals and tests against hand-worked numbers, and a best that has to be earned."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from fedmoe_core.comparison.significance import Comparison, best_of, holm, mean_interval, paired


def test_the_interval_is_students() -> None:
    # 1, 2, 3, 4: mean 2.5, sd 1.29099, t(.975, 3) = 3.18245: half width 3.18245 * 1.29099 / 2
    found = mean_interval([1.0, 2.0, 3.0, 4.0])
    assert found.mean == 2.5
    assert found.half_width == pytest.approx(2.05426, abs=1e-5)
    assert math.isnan(mean_interval([5.0]).half_width)


def test_holm_by_hand() -> None:
    # sorted .01 .02 .03 .04, times 4 3 2 1: .04 .06 .06 .04, then never falling: .04 .06 .06 .06
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_holm_does_not_count_what_could_not_be_tested() -> None:
    corrected = holm([math.nan, 0.03, 0.02])
    assert math.isnan(corrected[0])
    assert corrected[1:] == pytest.approx([0.04, 0.04])


def test_paired_tests_equal_scipys_and_use_common_seeds_only() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, 9), rng.normal(0.8, 1, 9)
    found = paired({**dict(enumerate(a)), 99: 5.0}, {**dict(enumerate(b)), 77: -5.0})
    assert found.pairs == 9
    assert found.difference == pytest.approx((b - a).mean())
    assert found.t_p == pytest.approx(stats.ttest_rel(b, a).pvalue)
    assert found.wilcoxon_p == pytest.approx(stats.wilcoxon(b, a).pvalue)


def test_constant_gaps() -> None:
    same = paired({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0})
    assert (same.difference, same.t_p, same.wilcoxon_p) == (0.0, 1.0, 1.0)
    assert paired({0: 1.0, 1: 2.0, 2: 5.0}, {0: 2.0, 1: 3.0, 2: 6.0}).t_p == 0.0
    assert math.isnan(paired({0: 1.0}, {0: 2.0}).t_p)
    assert paired({0: 1.0}, {1: 2.0}).pairs == 0


def test_wilcoxon_counts_only_where_ranks_can_reach_the_level() -> None:
    eight = dict.fromkeys(range(8), 0.0)
    better = {seed: 1.0 + seed / 100 for seed in range(8)}
    few, many = ({str(i): better for i in range(n)} for n in (6, 13))
    assert all(one.wilcoxon_reaches and one.significant for one in Comparison.family(eight, few).values())
    assert all(not one.wilcoxon_reaches and one.significant for one in Comparison.family(eight, many).values())


def test_best_is_named_only_where_it_beats_everybody() -> None:
    rng = np.random.default_rng(1)
    noise = {label: dict(enumerate(rng.normal(0, 0.1, 8))) for label in "abc"}
    assert best_of(noise, more=True) is None
    clear = {**noise, "d": {seed: 1.0 + value for seed, value in noise["a"].items()}}
    assert best_of(clear, more=True) == "d"
    assert best_of(clear, more=False) is None
    assert best_of({"alone": {0: 1.0}}, more=True) is None
