"""Runs under masks: the bits of the same run without them, whoever drops out, on any number of ranks."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hand_made import plan_for, population, result_for, specs
from small_plain import made
from tiny_runs import TINY, fedmoe, write_notes

from fedmoe_core.algorithms.base import algorithm_class
from fedmoe_core.config.run_config import Config
from fedmoe_core.privacy.dropping import STEPS, UPDATE, dropped, drops_at
from fedmoe_core.privacy.masked import MaskedSums
from fedmoe_core.server.accumulator import Accumulator
from fedmoe_core.simulation import run as simulate
from fedmoe_core.simulation.observer import NullObserver
from fedmoe_core.simulation.process_group import Ranks
from fedmoe_core.simulation.round import Round, play_round
from fedmoe_core.simulation.worlds.found_plain import found_plain

Make = Callable[..., Config]
WORDS = ("adapter=own", "clients=8", "rounds=6", "threads=1", "train.batch_size=6", "train.local_steps=2")
SECURE, DROPPING = "privacy.secure=true", ("privacy.drop=0.4", "privacy.threshold=0.51")


@pytest.fixture
def config(tmp_path: Path) -> Make:
    return lambda *words, out="run": Config.load(overrides=[*WORDS, f"out={tmp_path / out}", *words])


def played(config: Config) -> list[tuple[Round, dict[str, torch.Tensor]]]:
    world = found_plain(config.resolved(), made(rows=240), Ranks(), NullObserver())
    state, found = world.algorithm.init(world.params), []
    for _ in range(config.rounds):
        state, round_ = play_round(world, state, NullObserver())
        found.append((round_, state.params))
    return found


def told(found: list[tuple[Round, dict[str, torch.Tensor]]]) -> list[str]:
    return [update.error for round_, _ in found for update in round_.updates if update.status != "ok"]


def test_every_round_has_the_bits_of_the_run_without_masks(config: Make) -> None:
    for (plain, before), (secure, after) in zip(played(config()), played(config(SECURE)), strict=True):
        assert [u.status for u in secure.updates] == [u.status for u in plain.updates] == ["ok"] * 8
        assert all(torch.equal(before[key], tensor) for key, tensor in after.items())


def test_every_round_has_the_same_bits_while_clients_drop_out_at_every_step(config: Make) -> None:
    asked = config(SECURE, *DROPPING, "rounds=12")
    steps = {drops_at(asked, round, client) for round in range(12) for client in range(8)}
    assert steps == {None, *range(5)}
    plain, secure = played(config(*DROPPING, "rounds=12")), played(asked)
    open_, closed = 0, 0
    for number, ((one, before), (other, after)) in enumerate(zip(plain, secure, strict=True)):
        if other.applied:
            assert [u.status for u in other.updates] == [u.status for u in one.updates]
            assert any(u.status == "refused" for u in one.updates) == any(dropped(asked, number, c) for c in range(8))
            open_ += 1
        else:
            closed += 1
            break  # from here on the models differ
        assert all(torch.equal(before[key], tensor) for key, tensor in after.items())
    assert open_ >= 3
    assert any(error == f"dropped out before {STEPS[UPDATE]}" for error in told(plain))


def test_a_round_below_the_threshold_changes_nothing_and_says_why(config: Make) -> None:
    found = played(config(SECURE, "privacy.drop=0.6", "privacy.threshold=0.9", "rounds=2"))
    start = found_plain(config().resolved(), made(rows=240), Ranks(), NullObserver()).params
    for round_, params in found:
        assert not round_.applied
        assert all(torch.equal(start[key], tensor) for key, tensor in params.items())
        assert {update.status for update in round_.updates} == {"refused"}
        assert any(
            "of 8 clients" in u.error and "below the threshold of 8, so the sum stays closed" in u.error
            for u in round_.updates
        )


def test_a_client_whose_training_fails_is_a_dropout(config: Make) -> None:
    """Its vector never comes, and the others take its masks off together."""
    words = ("aggregation.norm_bound=0.00388", "privacy.threshold=0.51", "rounds=2")
    plain, secure = played(config(*words)), played(config(SECURE, *words))
    assert len(told(plain)) in (2, 3)
    assert told(plain) == told(secure)
    assert all(torch.equal(plain[-1][1][key], tensor) for key, tensor in secure[-1][1].items())


def test_sums_of_experts_routers_and_denominators_come_back_whole() -> None:
    pop = population("privacy.secure=true")
    algorithm = algorithm_class("hfedmoe")(pop)
    updates = [algorithm.answer(plan_for(client), result_for(client)) for client in range(3)]
    plain, masked = Accumulator(specs()), MaskedSums(pop.config, 0, [0, 1, 2], lambda: Accumulator(specs()))
    for update in updates:
        assert plain.add(update, plan_for(update.client)).accepted
        assert masked.add(update, plan_for(update.client)).accepted
    sums, after = masked.opened(updates, [plan_for(client) for client in range(3)], together=False)
    assert torch.equal(sums.flatten(), plain.flatten())
    assert after == updates
    assert sums.accepted == 3


def test_an_update_that_the_client_itself_refuses_is_not_sent() -> None:
    pop = population("privacy.secure=true")
    algorithm = algorithm_class("hfedmoe")(pop)
    masked = MaskedSums(pop.config, 0, [0, 1, 2], lambda: Accumulator(specs()))
    update = algorithm.answer(plan_for(0), result_for(0))
    outcome = masked.add(replace(update, deltas={k: v * np.nan for k, v in update.deltas.items()}), plan_for(0))
    assert "NaN" in outcome.reason
    one, other = (algorithm.answer(plan_for(client), result_for(client)) for client in (1, 2))
    assert masked.add(one, plan_for(1)).accepted
    sums, (after,) = masked.opened([one], [plan_for(1)], together=False)
    assert sums.accepted == 0
    assert "only 1 of 3 clients sent their vectors, below the threshold of 3" in after.error
    assert other.status == "ok"


def test_masks_and_noise_together_have_the_bits_of_noise_alone(config: Make) -> None:
    private = ("privacy.clip=0.3", "privacy.noise=1", "privacy.delta=1e-3", "rounds=2")
    noisy, both = (
        simulate.run(config(*private, *words, out=name), adapter=made(), observer=NullObserver())
        for name, words in (("noisy", ()), ("both", (SECURE,)))
    )
    assert noisy["model_hash"] == both["model_hash"]
    assert noisy["epsilon"] == both["epsilon"]


def test_a_private_round_of_too_few_stays_closed_and_gets_its_noise(config: Make) -> None:
    """Clients are drawn one by one, so a round may have none or one, whose sum would be its vector."""
    words = ("privacy.clip=0.3", "privacy.noise=1", "privacy.delta=1e-3", "clients_per_round=2", "rounds=8")
    found = played(config(SECURE, *words))
    sizes = [len(round_.updates) for round_, _ in found]
    assert {0, 1} & set(sizes)
    assert max(sizes) >= 2
    for (round_, params), (_, before) in zip(found[1:], found, strict=False):
        assert round_.applied
        assert not any(torch.equal(before[key], tensor) for key, tensor in params.items())
        few = len(round_.updates) < 2
        assert all(("below the threshold of 2" in u.error) == few for u in round_.updates)


def test_sums_of_another_model_or_of_too_many_are_not_loaded() -> None:
    sums = Accumulator(specs())
    with pytest.raises(ValueError, match=r"sums of \(3,\) values are not of .*; load those of the same model"):
        sums.load(torch.zeros(3, dtype=torch.int64))
    flat = sums.flatten()
    flat[0] = 1 << 20
    with pytest.raises(ValueError, match="sums of 1048576 clients are past max_clients = 1024"):
        sums.load(flat)


def test_inv10_noise_on_one_rank_and_masks_and_noise_on_two_have_the_same_bits(tmp_path: Path) -> None:
    notes, found = write_notes(tmp_path / "notes.jsonl"), []
    private = ("train.trunk=fedavg", "privacy.clip=0.5", "privacy.noise=0.2", "privacy.delta=1e-3", "rounds=2")
    for ranks, more in ((1, ()), (2, (SECURE,))):
        out = tmp_path / f"run-{ranks}"
        where = (f"data=jsonl:{notes}", f"cache={tmp_path / 'cache'}", f"out={out}", f"ranks={ranks}")
        done = fedmoe("simulate", *TINY, *where, *private, *more)
        assert done.returncode == 0, done.stderr
        found.append(json.loads((out / "summary.json").read_text()))
    assert found[0]["model_hash"] == found[1]["model_hash"]
    assert found[0]["epsilon"] == found[1]["epsilon"] > 0
    assert found[1]["refused_updates"] == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["time.mode=buffered", "time.buffer=2", "budgets=speed=1e9"], "privacy.secure needs the clients of a round"),
        (["guard.rule=median"], "privacy.secure hides each client's change, and guard.rule=median compares them"),
        (["clients_per_round=1"], "privacy.secure hides nothing where one client makes a round"),
        (["privacy.threshold=0.5"], "privacy.threshold=0.5 does not fit"),
        (["privacy.drop=2"], "privacy.drop=2"),
    ],
)
def test_what_cannot_be_secure_is_refused(config: Make, words: list[str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        config(SECURE, *words)


def test_without_the_extra_it_is_refused_before_any_work(config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.startswith("fedmoe_core.privacy.secure"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cryptography.exceptions", None)
    with pytest.raises(ValueError, match=r"privacy.secure needs cryptography.*pip install 'fedmoe-core\[privacy\]'"):
        simulate.run(config(SECURE), adapter=made(), observer=NullObserver())
