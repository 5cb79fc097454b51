"""Where noise comes from: the seed gives the bits that it always gave, and of a secret the seed tells nothing."""

from __future__ import annotations

import hmac
from hashlib import sha256

import numpy as np
import pytest

from fedmoe_core.base.rng import counter_rng
from fedmoe_core.config.run_config import Config
from fedmoe_core.privacy import chance as under_test
from fedmoe_core.privacy.central import Central
from fedmoe_core.privacy.chance import Secret, Seeded
from fedmoe_core.privacy.discrete_gaussian import discrete_gaussian

KEY = bytes(range(32))
PRIVATE = ("clients=40", "clients_per_round=10", "privacy.clip=1", "privacy.noise=1", "privacy.delta=1e-3")


def drawn(source: Secret | Seeded, *where: int, purpose: str = "noise") -> tuple[int, ...]:
    return tuple(source.draws(purpose, *where).integers(0, 1 << 62, 4).tolist())


def test_the_seed_gives_the_bits_that_it_always_gave() -> None:
    want = counter_rng(7, "noise", 3, 1).integers(0, 1 << 62, 4)
    assert drawn(Seeded(7).at(3), 1) == tuple(want.tolist())
    noise = discrete_gaussian(1000, 6, Seeded(7).at(3).draws("privacy-noise", 0))
    assert noise.tolist() == [244, -1133, -1077, 868, -1294, -144]
    central = Central.of(Config.load(overrides=[*PRIVATE, "seed=7"]))
    assert central is not None
    assert central.sample(2, range(40)) == [7, 10, 12, 15, 20, 35]


def test_each_purpose_place_and_round_of_a_secret_has_a_stream_of_its_own() -> None:
    secret = Secret(0, KEY)
    places = [(round, purpose, *where) for round in range(3) for purpose in ("a", "b") for where in ((), (0,), (1, 0))]
    found = {drawn(secret.at(round), *where, purpose=purpose) for round, purpose, *where in places}
    assert len(found) == len(places)
    assert drawn(secret.at(2), 1, 0) == drawn(Secret(0, KEY).at(1).at(2), 1, 0)
    assert drawn(secret) != drawn(Secret(0, KEY[::-1]))


def test_the_key_of_a_round_leads_to_the_next_one_and_not_back() -> None:
    key = KEY
    for round in range(4):
        assert Secret(0, KEY).at(round) == Secret(round, key)
        key = hmac.digest(key, b'["next"]', sha256)
    with pytest.raises(ValueError, match="round 2 was drawn from a key that is gone; go on from round 3"):
        Secret(0, KEY).at(3).at(2)


def test_a_secret_shows_its_key_nowhere() -> None:
    secret = Secret(0, KEY)
    central = Central.of(Config.load(overrides=[*PRIVATE, "privacy.secret=true"]), secret)
    for text in (repr(secret), str(central), f"{secret}", secret.digest):
        assert KEY.hex() not in text
        assert repr(KEY) not in text
    assert secret.digest != Secret(0, KEY[::-1]).digest != secret.at(1).digest


def test_a_new_secret_is_drawn_from_the_operating_system(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Secret.new() != Secret.new()
    monkeypatch.setattr(under_test.secrets, "token_bytes", lambda count: KEY[:count])
    assert Secret.new() == Secret(0, KEY)


def test_who_takes_part_follows_from_the_secret_and_not_from_the_seed() -> None:
    words = [*PRIVATE, "privacy.secret=true"]
    by_seed = [Central.of(Config.load(overrides=[*words, f"seed={seed}"]), Secret(0, KEY)) for seed in (1, 2)]
    other = Central.of(Config.load(overrides=[*words, "seed=1"]), Secret(0, KEY[::-1]))
    drawn_1, drawn_2, drawn_3 = (
        [central.sample(round, range(40)) for round in range(5)] for central in (*by_seed, other) if central is not None
    )
    assert drawn_1 == drawn_2 != drawn_3
    found = np.bincount([c for round in range(2000) for c in by_seed[0].sample(round, range(40))], minlength=40) / 2000
    assert np.abs(found - 0.25).max() < 4.5 * np.sqrt(0.25 * 0.75 / 2000)


def test_the_seed_never_stands_in_for_a_secret_that_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"privacy\.secret=true needs the secret of the run"):
        Central.of(Config.load(overrides=[*PRIVATE, "privacy.secret=true"]))
    with pytest.raises(ValueError, match=r"privacy\.secret=true has nothing to draw without privacy\.clip"):
        Config.load(overrides=["privacy.secret=true"])
