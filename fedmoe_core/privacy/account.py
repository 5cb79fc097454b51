"""How much privacy the rounds of a run have spent, by the accountant of dp-accounting."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fedmoe_core.config.run_config import Config

EXTRA = "pip install 'fedmoe-core[privacy]'"


@dataclass(frozen=True)
class Account:
    """The (epsilon, delta) of a run in which every client takes part in each round by the same chance.

    Each round is a Poisson-sampled Gaussian mechanism. Two runs are neighbours where one client contributes in one of
    them and in the other never does. The Renyi accountant is dp-accounting's (Mironov 2017; Mironov, Talwar and Zhang
    2019). What it needs is a number of rounds, so a resumed run goes on with the account of one never interrupted.

    Attributes:
        chance: with which a client takes part in a round, in (0, 1].
        noise: sigma over the largest L2 norm of one client's part, above 0.
        delta: of (epsilon, delta).
        limit: largest epsilon; 0 = none.

    Example:
        >>> round(Account(chance=0.01, noise=4.0, delta=1e-5).epsilon(10_000), 2)  # Abadi et al. 2016: 1.26
        1.04
    """

    chance: float
    noise: float
    delta: float
    limit: float = 0.0

    @classmethod
    def of(cls, config: Config) -> Account | None:
        """Return the account of a run; None where it adds no noise, so that nothing is private."""
        privacy = config.privacy
        if not privacy.noise:
            return None
        chance = (config.clients_per_round or config.clients) / config.clients
        return cls(chance, privacy.noise, privacy.delta, privacy.epsilon)

    def epsilon(self, rounds: int) -> float:
        """Return the epsilon that so many rounds spend.

        Raises:
            ValueError: dp-accounting is not installed.
        """
        if not rounds:
            return 0.0
        dp, rdp = _accounting()
        accountant = rdp.RdpAccountant(neighboring_relation=dp.NeighboringRelation.ADD_OR_REMOVE_ONE)
        with _without_left_out_orders():
            accountant.compose(dp.PoissonSampledDpEvent(self.chance, dp.GaussianDpEvent(self.noise)), rounds)
            return float(accountant.get_epsilon(self.delta))

    def affordable(self, rounds: int) -> int:
        """Return how many of so many rounds stay inside the limit."""
        if not self.limit or self.epsilon(rounds) <= self.limit:
            return rounds
        inside, beyond = 0, rounds
        while beyond - inside > 1:
            middle = (inside + beyond) // 2
            inside, beyond = (middle, beyond) if self.epsilon(middle) <= self.limit else (inside, middle)
        return inside


def rounds_of(config: Config) -> int:
    """Return how many rounds a run plays: those asked for, or fewer where epsilon ends it."""
    account = Account.of(config)
    return config.rounds if account is None else account.affordable(config.rounds)


def spent(config: Config, round: int) -> dict[str, float]:
    """Return what a round's line tells of privacy after ``round`` rounds; nothing where the run adds no noise."""
    account = Account.of(config)
    return {} if account is None else {"epsilon": account.epsilon(round)}


def spent_in_all(config: Config, rounds: int) -> dict[str, Any]:
    """Return what the summary tells of privacy after the last of ``rounds`` rounds, and why it was the last."""
    account = Account.of(config)
    if account is None:
        return {}
    return {"epsilon": account.epsilon(rounds), "delta": account.delta, "stopped": stopped(config)}


def stopped(config: Config) -> str:
    """Say why a run ends before ``rounds``; empty where it does not."""
    account, rounds = Account.of(config), rounds_of(config)
    if account is None or rounds == config.rounds:
        return ""
    return (
        f"round {rounds + 1} would spend epsilon {account.epsilon(rounds + 1):.3f} of "
        f"privacy.epsilon={account.limit:g}, so the run ends after round {rounds} of {config.rounds}"
    )


@contextmanager
def _without_left_out_orders() -> Iterator[None]:
    """Keep dp-accounting from saying, several times a round, which Renyi orders it leaves out.

    Epsilon is the smallest bound over all orders, so without some of them it is at most larger.
    """

    def needed(record: logging.LogRecord) -> bool:
        return "Excluding this order" not in record.getMessage()

    logger = logging.getLogger("absl")
    logger.addFilter(needed)
    try:
        yield
    finally:
        logger.removeFilter(needed)


def _accounting() -> tuple[Any, Any]:
    try:
        import dp_accounting
        from dp_accounting import rdp
    except ImportError as error:
        raise ValueError(f"privacy.noise needs dp-accounting, which is not installed ({error}); {EXTRA}") from error
    return dp_accounting, rdp
