"""Intervals, paired tests, Holm's correction and bold print, by hand and against scipy."""

from __future__ import annotations

from itertools import product
from math import isnan, nan, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedmoe_core.significance import holm, judge, mean_interval, paired_p

SEEDS = st.integers(0, 2**32 - 1)


def test_the_interval_by_hand() -> None:
    """Mean 3, s = sqrt(2.5), t(.975; 4) = 2.776445: 3 +- 1.963243."""
    found = mean_interval([1, 2, 3, 4, 5])
    assert (found.mean, found.count) == (3.0, 5)
    assert found.high - 3 == pytest.approx(2.776445105 * sqrt(2.5) / sqrt(5), rel=1e-8)
    assert found.low == pytest.approx(6 - found.high)
    assert mean_interval([1, None, 3, nan]).mean == 2.0
    assert mean_interval([1, 2, 3], confidence=0.5).high < mean_interval([1, 2, 3]).high


def test_too_few_values_have_no_interval() -> None:
    alone = mean_interval([None, 4.0])
    assert (alone.mean, alone.count) == (4.0, 1)
    assert isnan(alone.low)
    assert isnan(mean_interval([None]).mean)
    assert mean_interval([]).count == 0


@given(SEEDS, st.integers(2, 12))
@settings(max_examples=30, deadline=None)
def test_the_paired_t_equals_scipys(seed: int, count: int) -> None:
    a, b = np.random.default_rng(seed).normal([[0.4], [0.0]], 1.0, (2, count))
    assert paired_p(a.tolist(), b.tolist()) == pytest.approx(float(stats.ttest_rel(a, b).pvalue), rel=1e-9)
    assert paired_p(b.tolist(), a.tolist()) == pytest.approx(paired_p(a.tolist(), b.tolist()), rel=1e-12)


@given(SEEDS, st.integers(2, 8))
@settings(max_examples=20, deadline=None)
def test_wilcoxon_equals_the_enumeration_of_signs(seed: int, count: int) -> None:
    d = np.random.default_rng(seed).standard_normal(count) + 0.5
    ranks = np.argsort(np.argsort(np.abs(d))) + 1
    total = ranks.sum()
    spread = abs(2 * ranks[d > 0].sum() - total)
    signs = product([0, 1], repeat=count)
    extreme = sum(abs(2 * int(np.dot(some, ranks)) - total) >= spread for some in signs)
    assert paired_p(d.tolist(), [0.0] * count, test="wilcoxon") == pytest.approx(extreme / 2**count, abs=1e-12)


def test_eight_seeds_all_won_are_the_most_that_wilcoxon_can_say() -> None:
    won = [0.1 * (i + 1) for i in range(8)]
    assert paired_p(won, [0.0] * 8, test="wilcoxon") == pytest.approx(2 / 2**8)
    assert min(holm([2 / 2**8] * 6)) < 0.05 < min(holm([2 / 2**8] * 7))


def test_degenerate_pairs() -> None:
    assert paired_p([1, 2, 3], [1, 2, 3]) == 1.0
    assert paired_p([1, 2, 3], [1, 2, 3], test="wilcoxon") == 1.0
    assert paired_p([2, 3, 4], [1, 2, 3]) == 0.0
    assert isnan(paired_p([1, None, 3], [None, 2, 4]))
    assert paired_p([1, 5, 2, nan], [0, 3, 1.5, 9]) == pytest.approx(
        float(stats.ttest_rel([1, 5, 2], [0, 3, 1.5]).pvalue)
    )
    with pytest.raises(ValueError, match="2 values cannot be paired with 3"):
        paired_p([1, 2], [1, 2, 3])


def test_holm_by_hand() -> None:
    """.005 * 4 = .02; .01 * 3 = .03; .03 * 2 = .06; .04 * 1 = .04, raised to .06."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == pytest.approx([1.0, 1.0])
    found = holm([0.01, nan, 0.02, None])
    assert found[0] == pytest.approx(0.02)
    assert found[2] == pytest.approx(0.02)
    assert isnan(found[1])
    assert isnan(found[3])
    assert holm([]) == []


@given(SEEDS, st.integers(1, 8), st.sampled_from([0.01, 0.05, 0.3]))
@settings(max_examples=50, deadline=None)
def test_holm_rejects_as_the_step_down_procedure_does(seed: int, count: int, level: float) -> None:
    p = np.random.default_rng(seed).random(count) ** 3
    rejected = set()
    for step, index in enumerate(np.argsort(p)):
        if p[index] > level / (count - step):
            break
        rejected.add(int(index))
    assert {index for index, value in enumerate(holm(p.tolist())) if value <= level} == rejected


def test_bold_only_where_significantly_best() -> None:
    rng = np.random.default_rng(0)
    base = rng.standard_normal(8) * 0.1 + 0.7
    column = {
        "worse": (base - 0.05 + 0.01 * rng.standard_normal(8)).tolist(),
        "best": (base + 0.01 * rng.standard_normal(8)).tolist(),
        "local": [None] * 8,
    }
    clear = judge(column)
    assert (clear.best, clear.bold, list(clear.p)) == ("best", True, ["worse"])
    # Unpaired, the spread over seeds (.1) would hide the gap of .05: the pairs are what shows it.
    assert stats.ttest_ind(column["best"], column["worse"]).pvalue > 0.05
    near = judge({**column, "near": (base + 0.001 + 0.02 * rng.standard_normal(8)).tolist()})
    assert not near.bold
    assert set(near.p) == {"worse", "best", "near"} - {near.best}
    losses = judge({name: values for name, values in column.items() if name != "local"}, higher_is_better=False)
    assert (losses.best, losses.bold) == ("worse", True)


def test_na_in_a_column() -> None:
    assert judge({"a": [None, None], "b": [nan, nan]}).best is None
    alone = judge({"a": [1.0, 2.0], "b": [None, None]})
    assert (alone.best, alone.bold, alone.p) == ("a", False, {})
    one_seed = judge({"a": [1.0], "b": [0.0]})
    assert (one_seed.best, one_seed.bold) == ("a", False)
    assert isnan(one_seed.p["b"])
    assert judge({"first": [1.0, 1.0], "second": [1.0, 1.0]}).best == "first"
    assert judge({"a": [1.0, 2.0]}).bold is False


@pytest.mark.parametrize("test", ["t", "wilcoxon"])
def test_under_equality_bold_is_rare(test: str) -> None:
    """Ten equal systems, 8 seeds: the best of them is bold in at most one of twenty tables, and in fact far less."""
    rng = np.random.default_rng(1)
    bold = 0
    for _ in range(40):
        table = rng.standard_normal((10, 8))
        bold += judge({str(i): row.tolist() for i, row in enumerate(table)}, test=test).bold  # type: ignore[arg-type]
    assert bold <= 2
