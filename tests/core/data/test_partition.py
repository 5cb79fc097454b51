"""Partitioners: every row exactly once, nobody empty, skew that follows alpha."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmoe_core.base.rng import counter_rng
from fedmoe_core.data.partition import LEAST_ROWS, counts, parse_scheme, partition

SCHEMES = ("iid", "domain", "dirichlet:0.05", "dirichlet:0.5", "dirichlet:100")


@given(
    seed=st.integers(0, 2**31),
    clients=st.integers(1, 12),
    rows_of_group=st.lists(st.integers(1, 60), min_size=12, max_size=15),
    scheme=st.sampled_from(SCHEMES),
)
def test_every_row_has_one_owner_and_nobody_is_empty(
    seed: int, clients: int, rows_of_group: list[int], scheme: str
) -> None:
    groups_N = counter_rng(seed, "test order").permutation(np.repeat(np.arange(len(rows_of_group)), rows_of_group))
    owner_N = partition(groups_N, clients=clients, scheme=scheme, seed=seed)
    assert owner_N.shape == groups_N.shape
    assert set(owner_N) == set(range(clients))
    again_N = partition(groups_N, clients=clients, scheme=scheme, seed=seed)
    assert np.array_equal(owner_N, again_N)
    counts_CD = counts(owner_N, groups_N, (clients, len(rows_of_group)), np.ones(len(groups_N), np.int64))
    assert counts_CD.sum(0).tolist() == rows_of_group
    if scheme == "iid":
        assert np.ptp(counts_CD.sum(1)) <= 1
    if scheme == "domain":
        assert ((counts_CD > 0).sum(0) == 1).all()  # every domain stays whole
    if scheme.startswith("dirichlet"):
        assert counts_CD.sum(1).min() >= min(LEAST_ROWS, len(groups_N) // (2 * clients))


@pytest.mark.parametrize("scheme", ["iid", "dirichlet:0.5"])
def test_other_seeds_deal_otherwise(scheme: str) -> None:
    groups_N = np.arange(400) % 4
    first, second = (partition(groups_N, clients=5, scheme=scheme, seed=seed) for seed in (0, 1))
    assert not np.array_equal(first, second)


def test_dirichlet_skew_follows_alpha() -> None:
    """Mean total-variation distance between a client's label mix and the global one, over 5 seeds."""
    groups_N = np.arange(4000) % 4
    distance = {}
    for alpha in (0.1, 1.0, 10.0, 1000.0):
        per_seed = []
        for seed in range(5):
            owner_N = partition(groups_N, clients=10, scheme=f"dirichlet:{alpha}", seed=seed)
            counts_CD = counts(owner_N, groups_N, (10, 4), np.ones(4000, np.int64))
            mix_CD = counts_CD / counts_CD.sum(1, keepdims=True)
            per_seed.append(0.5 * np.abs(mix_CD - 0.25).sum(1).mean())
        distance[alpha] = float(np.mean(per_seed))
    assert distance[0.1] > 0.45 > distance[1.0] > 0.15 > distance[10.0] > 0.03 > distance[1000.0]


def test_dirichlet_shares_have_the_right_moments() -> None:
    """A share of Dir(a, ..., a) over C clients has mean 1/C and variance (C - 1) / (C^2 (C a + 1))."""
    clients, alpha = 5, 2.0
    shares = []
    for seed in range(300):
        owner_N = partition(np.zeros(2000, np.int64), clients=clients, scheme=f"dirichlet:{alpha}", seed=seed)
        shares.append(np.bincount(owner_N, minlength=clients) / 2000)
    expected = (clients - 1) / (clients**2 * (clients * alpha + 1))
    assert np.mean(shares, axis=0) == pytest.approx(np.full(clients, 1 / clients), abs=0.02)
    assert np.var(shares) == pytest.approx(expected, rel=0.15)


def test_domain_evens_out_the_load() -> None:
    groups_N = np.repeat(np.arange(5), (50, 30, 20, 20, 10))
    owner_N = partition(groups_N, clients=2, scheme="domain", seed=0)
    assert sorted(np.bincount(owner_N).tolist()) == [60, 70]


@pytest.mark.parametrize(
    ("scheme", "says"),
    [
        ("iidd", "did you mean 'iid'"),
        ("dirichlet", "above 0"),
        ("dirichlet:0", "above 0"),
        ("dirichlet:-1", "above 0"),
        ("dirichlet:nan", "above 0"),
        ("dirichlet:inf", "above 0"),
        ("dirichlet:much", "above 0"),
        ("dirchlet:1", "did you mean 'dirichlet:1'"),
        ("iid:3", "did you mean 'iid'"),
    ],
)
def test_unknown_partitioners_are_refused_by_name(scheme: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as error:
        parse_scheme(scheme)
    assert scheme in str(error.value)


def test_more_clients_than_rows_or_domains_is_refused() -> None:
    with pytest.raises(ValueError, match=r"clients=4 needs 4 .* but 3 are left"):
        partition(np.zeros(3, np.int64), clients=4, scheme="iid", seed=0)
    with pytest.raises(ValueError, match="clients=4 is more than the 3 domains"):
        partition(np.arange(9) % 3, clients=4, scheme="domain", seed=0)
    with pytest.raises(ValueError, match="at least 1"):
        partition(np.arange(9), clients=0, scheme="iid", seed=0)
    with pytest.raises(ValueError, match="resolved"):
        partition(np.arange(9), clients=3, scheme="auto", seed=0)


def test_counter_rng_streams_differ_by_every_argument() -> None:
    places = ((), (0,), (1,), (0, 0), (0, 1), (1, 0))
    draws = {
        tuple(counter_rng(seed, purpose, *where).integers(0, 2**60, size=2).tolist())
        for seed in (0, 1)
        for purpose in ("a", "b")
        for where in places
    }
    assert len(draws) == 2 * 2 * len(places)
    with pytest.raises(ValueError, match=">= 0"):
        counter_rng(-1, "a")
