"""What ``[time]`` needs and refuses: speeds for a clock, a buffer for a buffered run."""

from __future__ import annotations

import pytest

from fedmoe_core.config.run_config import Config

SPEEDS = "budgets=phone-8gb;experts=25%,speed=2e9"
BUFFERED = (SPEEDS, "time.mode=buffered", "time.buffer=4", "clients_per_round=6")


@pytest.mark.parametrize("word", ["time.deadline=3", "time.straggle=0.2", "time.target=2"])
def test_time_needs_a_speed_in_every_tier(word: str) -> None:
    tiers = "budgets=phone-8gb;experts=25%,speed=2e9"
    config = Config.load(overrides=[word, tiers])
    assert Config.load(overrides=[word, tiers]).to_toml() == config.to_toml()
    assert config.diff(Config.load(overrides=[tiers]))
    with pytest.raises(ValueError, match=r"needs the speed of every device, and budget 'experts=8' states none"):
        Config.load(overrides=[word, "budgets=phone-8gb;experts=8"])


def test_a_buffered_runs_configuration_survives_its_text() -> None:
    config = Config.load(overrides=[*BUFFERED, "time.staleness=0"])
    assert (config.time.mode, config.time.buffer, config.time.staleness) == ("buffered", 4, 0.0)
    assert set(config.diff(Config.load(overrides=[SPEEDS, "clients_per_round=6"]))) == {
        "time.mode",
        "time.buffer",
        "time.staleness",
    }


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ("time.buffer=0",),
            "time.mode=buffered needs time.buffer, the answers that make a server step; set 1 or more",
        ),
        (("time.buffer=-1",), "time.buffer=-1 does not fit; give a whole number of at least 0"),
        (("time.buffer=7",), "time.buffer=7 exceeds clients_per_round=6; lower it, or raise clients_per_round"),
        (("time.buffer=11", "clients_per_round=0"), "time.buffer=11 exceeds clients=10; lower it, or raise clients"),
        (("min_clients=5",), "min_clients=5 exceeds time.buffer=4; lower it, or raise time.buffer"),
        (("time.mode=rounds",), "time.buffer=4 is for buffered runs; set time.mode=buffered, or leave it out"),
        (("time.deadline=9",), "time.deadline=9 ends a round, and a buffered run waits for none; leave it out, or set"),
        (("aggregation.gate=literal",), "aggregation.gate=literal rescales whole routers by the clients of a round"),
        (("time.staleness=-1",), "time.staleness=-1"),
        (("time.staleness=11",), "time.staleness=11"),
        (("time.mode=async",), "time.mode='async'"),
        (
            ("budgets=experts=8",),
            "time.mode=buffered needs the speed of every device, and budget 'experts=8' states none",
        ),
    ],
)
def test_what_a_buffered_run_cannot_be_is_one_sentence(words: tuple[str, ...], told: str) -> None:
    with pytest.raises(ValueError) as error:
        Config.load(overrides=[*BUFFERED, *words])
    assert told in str(error.value)
    assert "\n" not in str(error.value)
