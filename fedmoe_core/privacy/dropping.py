"""Simulated clients that drop out of a round, each at one step of secure aggregation, drawn by the seed."""

from __future__ import annotations

from fedmoe_core.base.rng import counter_rng
from fedmoe_core.config.run_config import Config

# Before which a client may drop out; from the fourth on its vector is in the sums already.
STEPS = ("telling its keys", "sharing its secrets", "sending its update", "signing the survivors", "opening its shares")
UPDATE = 2  # the step that sends it


def drops_at(config: Config, round: int, client: int) -> int | None:
    """Return the step before which a client drops out of a round; None where it stays. The same on every rank."""
    if not config.privacy.drop:
        return None
    rng = counter_rng(config.seed, "drop", round, client)
    return int(rng.integers(len(STEPS))) if rng.random() < config.privacy.drop else None


def dropped(config: Config, round: int, client: int) -> str:
    """Say where a client dropped out before its update was sent; empty where it did not. Secure or not, alike."""
    step = drops_at(config, round, client)
    return "" if step is None or step > UPDATE else f"dropped out before {STEPS[step]}"
