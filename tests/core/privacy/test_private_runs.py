"""Private runs: who is drawn, noise everywhere, the same bits in every way of playing, and an end at the limit."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hand_made import EVERY_LE, model, plan_for, population, result_for, specs
from small_plain import made
from tiny_corpus import make_config
from tiny_runs import fedmoe, fedmoe_here

from fedmoe_core.algorithms.base import algorithm_class
from fedmoe_core.config.run_config import Config
from fedmoe_core.config.systems import PLACES
from fedmoe_core.messages.plan import ExpertPlan
from fedmoe_core.messages.update import ClientUpdate
from fedmoe_core.model.spec import ParamSpec
from fedmoe_core.privacy import chance
from fedmoe_core.privacy.account import Account
from fedmoe_core.privacy.central import Central, moved_by_training
from fedmoe_core.reporting.report import report
from fedmoe_core.server.accumulator import Accumulator
from fedmoe_core.server.state import initial_state
from fedmoe_core.simulation import run as simulate
from fedmoe_core.simulation.directory import log
from fedmoe_core.simulation.observer import NullObserver
from fedmoe_core.simulation.round import sample_clients

Make = Callable[..., Config]
WORDS = ("adapter=own", "clients=6", "rounds=4", "threads=1", "train.batch_size=6", "train.local_steps=3")
PRIVATE = ("privacy.clip=0.3", "privacy.noise=1.5", "privacy.delta=1e-3", "clients_per_round=3")
FIT = {"hfedmoe", "hfedmoe_plus", "random", "most_activated", "reap_experts", "fedavg", "fedavg_smallest"}


@pytest.fixture
def config(tmp_path: Path) -> Make:
    return lambda *words, out="run": Config.load(overrides=[*WORDS, f"out={tmp_path / out}", *words])


def played(config: Config) -> dict[str, object]:
    return simulate.run(config, adapter=made(), observer=NullObserver())


def lines(config: Config) -> list[dict[str, object]]:
    return [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]


def rounds(config: Config) -> list[dict[str, object]]:
    return [line for line in lines(config) if line["type"] == "round" and line["round"]]


def released(private: Central, updates: Sequence[ClientUpdate] = ()) -> tuple[Accumulator, object]:
    sums = Accumulator(specs(), private.settings, train_dense=True)
    for update in updates:
        assert sums.add(update, plan_for(update.client), share=0.5).accepted
    return sums, private.released(sums.sums(), round=3)


@pytest.mark.parametrize("share", [1, 3, 6])
def test_each_client_is_drawn_by_itself_with_the_chance_of_the_account(config: Make, share: int) -> None:
    asked = config(*PRIVATE, f"clients_per_round={share}")
    drawn = [sample_clients(asked, round) for round in range(3000)]
    found = np.bincount([client for clients in drawn for client in clients], minlength=6) / 3000
    account = Account.of(asked)
    assert account is not None
    assert account.chance == share / 6
    assert np.abs(found - account.chance).max() < 4.5 * np.sqrt(account.chance * (1 - account.chance) / 3000) + 1e-12
    assert (len({len(clients) for clients in drawn}) == 1) == (share == 6)
    assert all(clients == sorted(set(clients)) for clients in drawn)
    assert sample_clients(asked, 0, absent={drawn[0][0]} if drawn[0] else ()) == drawn[0][1:]


def test_noise_is_on_every_number_that_could_have_moved_and_has_the_variance_of_the_account() -> None:
    config = Config.load(overrides=["clients=3", "privacy.clip=0.25", "privacy.noise=2", "privacy.delta=1e-3"])
    private = Central.of(config)
    assert private is not None
    empty, told = released(private)
    assert empty.accepted == 0
    values = torch.cat([told.numerators[spec.key].flatten() for spec in specs()])
    assert (values == 0).float().mean() < 1e-3  # experts that no client trained included
    unit = 2.0**-private.settings.scale_bits
    sigma = float(values.double().pow(2).mean().sqrt()) * unit
    assert sigma == pytest.approx(2 * 0.25, rel=0.2)  # 541 numbers: 3 % is one standard deviation
    assert {int(den) for den in told.expert_den_LE.flatten()} == {3}
    assert (told.gate_den, told.dense_den, told.round_den, told.accepted) == (3, 3, 3, 3)


def test_what_is_told_depends_on_clients_through_the_numerators_alone() -> None:
    private = Central.of(Config.load(overrides=["clients=3", "privacy.clip=1"]))
    assert private is not None
    pop = population("algorithm=hfedmoe")
    algorithm = algorithm_class("hfedmoe")(pop)
    updates = [algorithm.answer(plan_for(client), result_for(client)) for client in range(3)]
    updates = [
        replace(u, deltas=result_for(u.client).deltas | {"dense.head": torch.zeros(7, 3).double()}) for u in updates
    ]
    (_, none), (_, all_) = released(private), released(private, updates)
    for name in ("expert_den_LE", "router_den_LE", "expert_voters_LE", "router_voters_LE"):
        assert torch.equal(getattr(none, name), getattr(all_, name))
    assert (none.gate_den, none.dense_den, none.round_den) == (all_.gate_den, all_.dense_den, all_.round_den)
    # HFedMoE's step by them: the sum of what three clients sent at weight 1, through 3.
    params = model()
    after = algorithm.advance(initial_state(params, 3), all_, updates).params
    layer_0 = [np.flatnonzero(plan_for(client).trainable_LE[0]) for client in range(3)]
    expected = torch.zeros_like(params["moe.0.w_out"])
    for update, rows in zip(updates, layer_0, strict=True):
        votes = update.expert_weight_LE[0, rows] > 0
        expected[rows[votes]] += 0.5 * update.deltas["moe.0.w_out"][votes] / 3
    assert torch.allclose(after["moe.0.w_out"] - params["moe.0.w_out"], expected, atol=1e-6)


def test_beside_adapters_the_biases_that_no_client_sends_get_no_noise() -> None:
    bias, factor = (ParamSpec(f"moe.0.{name}", "expert", (4, 2), torch.float32, 0) for name in ("bias_in", "a_in"))
    assert moved_by_training((bias,)) == (bias,)
    assert moved_by_training((bias, factor)) == (factor,)


@pytest.mark.parametrize("name", sorted(FIT))
def test_a_system_that_may_be_private_makes_the_model_of_the_sums_alone(name: str) -> None:
    """Without what clients reported beside their deltas, the next model is the same."""
    pop = population(f"algorithm={name}", "aggregation.gate=fedavg")
    algorithm = algorithm_class(name)(pop)
    private = Central.of(Config.load(overrides=["clients=3", "privacy.clip=1"]))
    assert private is not None
    _, told = released(private)
    updates = [algorithm.answer(plan_for(client), result_for(client)) for client in range(3)]
    bare = [replace(update, profile=None, private={}, metrics={}) for update in updates]
    with_reports, without = (algorithm.apply(initial_state(model(), 3), told, given) for given in (updates, bare))
    assert with_reports[0].keys() == without[0].keys()
    assert all(torch.equal(with_reports[0][key], without[0][key]) for key in without[0])
    assert EVERY_LE.shape == pop.every_LE.shape


SCORES = [f"selection.score={score}" for score in ("s", "ib", "taylor")]
PLUS = [f"plus.importance={score}" for score in ("s", "ib", "taylor", "hits")]
VARIANTS = [(name, "plus.explore=0") for name in sorted(FIT - {"hfedmoe", "hfedmoe_plus"})]
VARIANTS += [("hfedmoe", word) for word in [*SCORES, "selection.explore=1"]]
VARIANTS += [("hfedmoe_plus", word) for word in [*PLUS, "plus.explore=1"]]


def planned_after(name: str, words: Sequence[str]) -> list[ExpertPlan]:
    """The next plan of client 0: before any report, after its own, and after everybody's with the same sums."""
    tiers = ("experts=4", "experts=4", "experts=4")
    pop = population(f"algorithm={name}", "aggregation.gate=fedavg", *words, budgets=tiers)
    algorithm = algorithm_class(name)(pop)
    private = Central.of(Config.load(overrides=["clients=3", "privacy.clip=1"]))
    assert private is not None
    _, told = released(private)
    updates = [algorithm.answer(plan_for(client), result_for(client)) for client in range(3)]
    begin = initial_state(model(), 3)
    states = [begin, *(algorithm.advance(begin, told, given) for given in (updates[:1], updates))]
    return [algorithm.plan(state, [0])[0] for state in states]


@pytest.mark.parametrize(("name", "word"), VARIANTS)
def test_a_plan_of_a_private_run_has_nothing_of_what_others_reported(name: str, word: str) -> None:
    """It travels to a device, and decides what that device then trains."""
    first, alone, among = planned_after(name, [word, "privacy.clip=1"])
    assert among.id == alone.id
    for told in ("predicted", "budget", "seed", "local_steps", "mode"):
        assert getattr(among, told) == getattr(alone, told)
    if name.startswith("hfedmoe"):  # of what this client reported it has something
        assert not np.array_equal(first.permitted_LE, alone.permitted_LE)


def test_without_privacy_clients_learn_from_each_other_what_absent_experts_are_worth() -> None:
    _, alone, among = planned_after("hfedmoe_plus", ["plus.importance=taylor"])
    assert among.id != alone.id


def test_only_these_systems_may_be_private() -> None:
    assert {name for name in PLACES if algorithm_class(name).sums_alone} == FIT


def test_a_private_run_tells_what_it_has_spent(config: Make) -> None:
    asked = config(*PRIVATE)
    summary, account = played(asked), Account.of(asked)
    assert account is not None
    found = [line["epsilon"] for line in rounds(asked)]
    assert found == [account.epsilon(number) for number in (1, 2, 3, 4)]
    assert (summary["epsilon"], summary["delta"], summary["stopped"]) == (found[-1], 1e-3, "")
    page, told = report([Path(asked.out)])
    assert f"epsilon {found[-1]:.3f} at delta 0.001" in page.read_text("utf-8")
    assert f"epsilon {found[-1]:.3f} at delta 0.001" in told[0]


def test_a_limit_ends_the_run_in_good_order(config: Make, tmp_path: Path) -> None:
    account = Account(0.5, 1.5, 1e-3)
    limit = (account.epsilon(2) + account.epsilon(3)) / 2
    words = [*WORDS[1:], *PRIVATE, f"privacy.epsilon={limit}", "adapter=small_plain:adapter", f"out={tmp_path / 'run'}"]
    done = fedmoe_here("simulate", *words)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["rounds"], summary["epsilon"]) == (2, account.epsilon(2))
    assert summary["stopped"].startswith("round 3 would spend epsilon")
    assert "so the run ends after round 2 of 4" in summary["stopped"]
    assert summary["loss_after"] is not None
    assert "so the run ends after round 2 of 4" in done.stderr + done.stdout
    again = fedmoe_here("resume", tmp_path / "run")
    assert f"epsilon {account.epsilon(2):.3f}" in done.stderr + done.stdout
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["model_hash"] == summary["model_hash"]


def test_a_limit_that_the_first_round_would_pass_is_refused_before_any_work(config: Make) -> None:
    with pytest.raises(ValueError, match=r"round 1 would spend epsilon .*raise privacy.epsilon or privacy.noise"):
        played(config(*PRIVATE, "privacy.epsilon=0.01"))


@pytest.mark.parametrize("name", ["fedmoe", "flex_moe", "flux", "fft_moe", "flame", "hetlora", "flexlora"])
def test_a_system_that_tells_more_than_sums_is_refused(name: str, tmp_path: Path) -> None:
    asked = Config.load(overrides=[f"algorithm={name}", "privacy.clip=1", f"out={tmp_path / 'run'}"])
    with pytest.raises(ValueError, match=f"privacy.clip=1 is not for algorithm='{name}': it does not say that what"):
        simulate.run(asked, observer=NullObserver())


def test_a_round_without_clients_adds_noise_all_the_same(config: Make) -> None:
    asked = config(*PRIVATE, "clients=40", "clients_per_round=1", "rounds=6", "min_clients=1", "eval.every=6")
    present = [len(sample_clients(asked, round)) for round in range(6)]
    assert 0 in present
    played(asked)
    assert [line["applied"] for line in rounds(asked)] == [True] * 6
    assert sum(line["type"] == "client" for line in lines(asked)) == sum(present)


def test_clipping_alone_bounds_a_client_and_noise_moves_a_model_further(config: Make) -> None:
    plain = played(config("clients_per_round=0", out="plain"))
    wide = played(config("privacy.clip=1000", out="wide"))
    tight = played(config("privacy.clip=1e-4", out="tight"))
    noisy = played(config("privacy.clip=0.3", "privacy.noise=1", "privacy.delta=1e-3", out="noisy"))
    assert wide["loss_after"] == pytest.approx(plain["loss_after"], abs=1e-3)  # 15 rows each: FedAvg's own weights
    assert tight["loss_after"] == pytest.approx(plain["loss_before"], abs=1e-3)
    assert len({run["model_hash"] for run in (plain, wide, tight, noisy)}) == 4
    assert "epsilon" not in wide


class StopError(Exception):
    pass


class Killer(NullObserver):
    def on_round(self, round: int, rounds: int, record: object) -> None:
        if round == 2:
            raise StopError


def test_inv10_a_resumed_private_run_has_the_bits_of_one_never_interrupted(config: Make) -> None:
    whole = played(config(*PRIVATE, out="whole"))
    asked = config(*PRIVATE, out="killed")
    with pytest.raises(StopError):
        simulate.run(asked, adapter=made(), observer=Killer())
    resumed = simulate.resume(Path(asked.out), adapter=made(), observer=NullObserver())
    assert (resumed["model_hash"], resumed["epsilon"]) == (whole["model_hash"], whole["epsilon"])


def test_a_simulation_by_a_secret_has_other_bits_each_time_and_tells_the_same_epsilon(config: Make) -> None:
    by_seed = played(config(*PRIVATE, out="seed"))
    one, other = (played(config(*PRIVATE, "privacy.secret=true", out=f"secret-{n}")) for n in range(2))
    assert len({run["model_hash"] for run in (by_seed, one, other)}) == 3
    assert by_seed["epsilon"] == one["epsilon"] == other["epsilon"]


def test_a_new_run_in_a_directory_leaves_nothing_of_the_secret_before_it(config: Make) -> None:
    asked = config(*PRIVATE, "privacy.secret=true")
    first = played(asked)
    kept = (Path(asked.out) / "secret.json").read_text()
    second = simulate.run(asked, adapter=made(), observer=NullObserver(), force=True)
    assert second["model_hash"] != first["model_hash"]
    assert (Path(asked.out) / "secret.json").read_text() != kept
    simulate.run(config(*PRIVATE), adapter=made(), observer=NullObserver(), force=True)
    assert not (Path(asked.out) / "secret.json").exists()


def test_inv10_a_secret_gives_the_same_bits_after_a_kill_and_on_two_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("rounds=3", "clients_per_round=2", "privacy.clip=0.5", "privacy.noise=0.2", "privacy.delta=1e-3")
    make = make_config(tmp_path, tmp_path / "shared")
    with monkeypatch.context() as patched:
        patched.setattr(chance.secrets, "token_bytes", lambda count: bytes(range(count)))
        whole = simulate.run(make(*words, "privacy.secret=true", out_name="whole"), observer=NullObserver())
        killed = make(*words, "privacy.secret=true", out_name="killed")
        with pytest.raises(StopError):
            simulate.run(killed, observer=Killer())
    settings = Path(killed.out) / "config.toml"
    settings.write_text(settings.read_text().replace("ranks = 1", "ranks = 2"))
    done = fedmoe("resume", killed.out)
    assert done.returncode == 0, done.stderr
    assert json.loads((Path(killed.out) / "summary.json").read_text())["model_hash"] == whole["model_hash"]
    assert "ranks = 2" in settings.read_text()


def test_inv10_a_kill_between_the_checkpoint_and_the_next_key_changes_nothing(
    config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, asked = log.write_secret, config(*PRIVATE, "privacy.secret=true", out="killed")

    def killed(out: Path, secret: chance.Secret) -> None:
        if secret.round == 2:
            raise StopError
        write(out, secret)

    with monkeypatch.context() as patched:
        patched.setattr(chance.secrets, "token_bytes", lambda count: bytes(range(count)))
        whole = played(config(*PRIVATE, "privacy.secret=true", out="whole"))
        patched.setattr(log, "write_secret", killed)
        with pytest.raises(StopError):
            played(asked)
    assert json.loads((Path(asked.out) / "secret.json").read_text())["round"] == 1  # the checkpoint is of round 2
    resumed = simulate.resume(Path(asked.out), adapter=made(), observer=NullObserver())
    assert resumed["model_hash"] == whole["model_hash"]


def test_privacy_by_a_secret_without_its_package_is_refused_before_any_work(
    config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fedmoe_core.privacy.stream", None)
    with pytest.raises(ValueError, match=r"privacy\.secret needs cryptography, which is not installed"):
        played(config(*PRIVATE, "privacy.secret=true"))
