"""The account of privacy: dp-accounting's own numbers, closed forms that bound them, and where a limit ends a run."""

from __future__ import annotations

import logging
import math
import sys

import dp_accounting
import pytest
from dp_accounting import pld, rdp
from scipy.optimize import brentq
from scipy.stats import norm

from fedmoe_core.config.run_config import Config
from fedmoe_core.privacy.account import Account, rounds_of, spent, spent_in_all, stopped

SETTINGS = [(0.01, 1.1, 1e-5, 1000), (0.2, 2.0, 1e-4, 40), (1.0, 5.0, 1e-6, 12)]


@pytest.mark.parametrize(("chance", "noise", "delta", "rounds"), SETTINGS)
def test_epsilon_is_that_of_dp_accounting(chance: float, noise: float, delta: float, rounds: int) -> None:
    event = dp_accounting.SelfComposedDpEvent(
        dp_accounting.PoissonSampledDpEvent(chance, dp_accounting.GaussianDpEvent(noise)), rounds
    )
    found = Account(chance, noise, delta).epsilon(rounds)
    assert found == pytest.approx(rdp.RdpAccountant().compose(event).get_epsilon(delta), rel=1e-12)
    assert found >= pld.PLDAccountant().compose(event).get_epsilon(delta)  # tighter, by another way


def test_orders_that_are_left_out_are_not_told_and_all_else_is(caplog: pytest.LogCaptureFixture) -> None:
    rdp.RdpAccountant().compose(dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.GaussianDpEvent(1.0)))
    assert caplog.records, "dp-accounting says it by itself"
    caplog.clear()
    Account(0.1, 1.0, 1e-3).epsilon(5)
    logging.getLogger("absl").warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]


def test_epsilon_is_below_what_abadi_et_al_published() -> None:
    """Deep Learning with Differential Privacy, section 3.2: q = 0.01, sigma = 4, delta = 1e-5, 10,000 steps: 1.26."""
    assert 0.8 < Account(0.01, 4.0, 1e-5).epsilon(10_000) <= 1.26


@pytest.mark.parametrize(("noise", "rounds"), [(5.0, 12), (20.0, 100), (1.0, 1)])
def test_where_all_take_part_epsilon_lies_between_two_closed_forms(noise: float, rounds: int) -> None:
    """T Gaussian mechanisms are one of sigma / sqrt(T): exact by Balle and Wang 2018, at most by zCDP's rule."""
    delta, one = 1e-5, math.sqrt(rounds) / noise

    def exact_delta(epsilon: float) -> float:
        return float(norm.cdf(one / 2 - epsilon / one) - math.exp(epsilon) * norm.cdf(-one / 2 - epsilon / one) - delta)

    exact, rho = brentq(exact_delta, 0, 200), one**2 / 2
    found = Account(1.0, noise, delta).epsilon(rounds)
    assert exact <= found <= rho + 2 * math.sqrt(rho * math.log(1 / delta))


def test_no_round_spends_nothing_and_each_spends_more() -> None:
    account = Account(0.1, 1.0, 1e-3)
    assert account.epsilon(0) == 0.0
    spent_by = [account.epsilon(rounds) for rounds in range(1, 6)]
    assert spent_by == sorted(set(spent_by))


@pytest.mark.parametrize("limit", [0.0, 0.01, 1.0, 2.5, 1e9])
def test_a_run_affords_the_last_round_inside_its_limit(limit: float) -> None:
    account = Account(0.1, 1.0, 1e-3, limit)
    affordable = account.affordable(30)
    fits = [rounds for rounds in range(31) if not limit or account.epsilon(rounds) <= limit]
    assert affordable == fits[-1]


def test_a_run_without_noise_has_no_account_and_one_with_noise_needs_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    clipped = Config.load(overrides=["privacy.clip=1"])
    assert Account.of(clipped) is None
    assert (spent(clipped, 3), spent_in_all(clipped, 3), stopped(clipped)) == ({}, {}, "")
    assert rounds_of(clipped) == clipped.rounds
    private = Config.load(overrides=["privacy.clip=1", "privacy.noise=1", "privacy.delta=1e-3", "clients_per_round=4"])
    assert Account.of(private) == Account(0.4, 1.0, 1e-3)
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ValueError, match=r"privacy.noise needs dp-accounting.*pip install 'fedmoe-core\[privacy\]'"):
        spent(private, 1)
