"""What ``[privacy]`` refuses: promises without a bound, and settings that would leak past the sums."""

from __future__ import annotations

import pytest

from fedmoe_core.config.run_config import Config

PRIVATE = ("privacy.clip=1", "privacy.noise=1", "privacy.delta=1e-3")
SPEED = "budgets=experts=50%,speed=1e9"


def test_a_private_configuration_survives_its_text_and_decides_results() -> None:
    config = Config.load(overrides=[*PRIVATE, "privacy.epsilon=8"])
    assert "privacy" in config.to_toml()
    assert set(config.diff(Config())) == {f"privacy.{name}" for name in ("clip", "noise", "delta", "epsilon")}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["privacy.noise=1"], "privacy.noise=1 hides nothing of unbounded size; set privacy.clip"),
        (["privacy.epsilon=3"], "privacy.epsilon=3 is passed by any round without noise; set privacy.noise"),
        (["privacy.clip=1", "privacy.delta=1e-5"], "privacy.delta=1e-05 counts with noise alone"),
        (["privacy.clip=1", "privacy.noise=1"], "privacy.delta=0 must be above 0 and below 1 / clients = 0.1"),
        ([*PRIVATE, "privacy.delta=0.1"], "privacy.delta=0.1 must be above 0 and below 1 / clients = 0.1, for with"),
        ([*PRIVATE, "clients=2000"], "privacy.delta=0.001 must be above 0 and below 1 / clients = 0.0005"),
        (["privacy.clip=1e-9"], "privacy.clip=1e-09 times privacy.noise=0 is not from 1e-06 to 1e+06"),
        ([*PRIVATE, "privacy.noise=1e9"], "times privacy.noise=1e+09 is not from"),
        ([*PRIVATE, "cohort.clients=2"], "cannot be kept with cohort.clients=2: who trains at once with a client"),
        ([*PRIVATE, "min_clients=2"], "cannot be kept with min_clients=2: whether a round counts would tell"),
        ([*PRIVATE, "algorithm=hfedmoe_plus", "plus.gate=frozen"], "cannot be kept with plus.gate=frozen: noise would"),
        ([*PRIVATE, "guard.quorum=2"], "cannot be kept with guard.quorum=2: whether an expert moves would tell"),
        ([*PRIVATE, "guard.rule=norm"], "cannot be kept with guard.rule=norm: one client's change can move a median"),
        ([*PRIVATE, "aggregation.gate=literal"], "cannot be kept with aggregation.gate=literal"),
        (
            [*PRIVATE, SPEED, "time.mode=buffered", "time.buffer=2"],
            "cannot be kept with time.mode=buffered: an answer to an older model",
        ),
        (["privacy.clip=-1"], "privacy.clip=-1.0 does not fit; give a number of at least 0"),
        (["privacy.delta=2"], "privacy.delta=2"),
    ],
)
def test_what_cannot_be_private_is_one_sentence(words: list[str], told: str) -> None:
    with pytest.raises(ValueError) as error:
        Config.load(overrides=words)
    assert told in str(error.value)
    assert "\n" not in str(error.value)
