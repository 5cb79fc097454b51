"""Runs over devices that are reached by bytes alone: the same model as the simulator's, bit for bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from near import Near, Spoil
from tiny_corpus import make_config
from tiny_runs import write_notes

from fedmoe_core.config.run_config import Config
from fedmoe_core.messages.plan import ExpertPlan
from fedmoe_core.messages.result import LocalFailure
from fedmoe_core.simulation.cohorts import training
from fedmoe_core.simulation.observer import NullObserver
from fedmoe_core.simulation.remote import node
from fedmoe_core.simulation.remote.federation import found_remote
from fedmoe_core.simulation.remote.words import Words
from fedmoe_core.simulation.run import resume, run

REMOTE = "train.timeout=60"


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("remote")


def both(config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """A simulated run, and the same over devices; their summaries."""
    here = run(config, observer=NullObserver())
    return here, deployed(replace(config, out=there_out(config)))


def deployed(config: Config, spoil: Spoil | None = None, near: Near | None = None) -> dict[str, Any]:
    words = [Words(client) for client in range(config.clients)]
    near = near or (Near(*words) if spoil is None else Near(*words, spoil=spoil))
    return run(config, observer=NullObserver(), founder=found_remote(near, wait=60))


def lines(out: str, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(out) / name).read_text().splitlines()]


@pytest.mark.parametrize(
    ("overrides", "labeled"),
    [
        ((), False),
        (("algorithm=hfedmoe_plus",), False),
        (("algorithm=hfedmoe_plus", "plus.gate=frozen"), False),
        (("train.experts=lora", "lora.rank=2"), False),
        (("train.trunk=fedavg",), True),
        (("algorithm=fedavg", "train.trunk=fedavg", "train.prox=0.1"), True),
        (("algorithm=random", "train.logit_adjustment=1", "train.token_dropout=0.2"), True),
        (("algorithm=fedavg_smallest",), False),
        (("algorithm=most_activated", "budgets=memory=60%;memory=100%,flops=3e7"), False),
        (("algorithm=attackers:OpposedFcMoE", "rounds=3"), False),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else str(value),
)
def test_inv10_devices_give_the_bits_of_the_simulator(
    overrides: tuple[str, ...], labeled: bool, shared: Path, tmp_path: Path
) -> None:
    here, there = both(make_config(tmp_path, shared)(REMOTE, *overrides, labeled=labeled))
    assert there["model_hash"] == here["model_hash"]
    assert there["refused_updates"] == here["refused_updates"] == 0
    assert (there["bytes_down"], there["bytes_up"]) == (here["bytes_down"], here["bytes_up"])


@pytest.mark.parametrize(
    ("overrides", "asks"),
    [
        (
            ("algorithm=fedmoe", "fedmoe.balance=0.01", "budgets=unlimited;experts=50%", "rounds=3"),
            {"WholeModelProbe", "SwitchBalance", "validate"},
        ),
        (("algorithm=flex_moe",), {"LocalFeedback"}),
        (
            ("algorithm=flux", "model_config.expert_width=32", "budgets=unlimited;memory=90%", "rounds=3"),
            {"QuantizedProfile", "ForwardEstimates"},
        ),
        (("algorithm=fft_moe",), {"HeterogeneityLoss"}),
        (("algorithm=flame",), {"cached"}),
        (("algorithm=hetlora", "lora.tail=0.1"), {"RankProbe", "TailLoss", "cached"}),
        (("algorithm=flexlora",), {"cached"}),
        (("selection.reschedule=batch", "selection.mode=backward-masked", "budgets=experts=50%"), {"TopScores"}),
        (("algorithm=toy:Toy", "budgets=unlimited"), {"Profile", "TrainedNorm", "SwitchBalance", "validate"}),
        (("algorithm=toy_lora:ToyLora", "budgets=unlimited"), {"cached"}),
        (("algorithm=toy_lora:ToyRound", "budgets=unlimited"), set()),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_inv10_systems_that_probe_lose_or_keep_give_the_bits_of_the_simulator(
    overrides: tuple[str, ...], asks: set[str], shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: set[str] = set()
    sound = node.local_round

    def noted(adapter: Any, params: Any, plan: ExpertPlan, **how: Any) -> Any:
        extras = plan.extras
        wishes = (extras.before, extras.after, extras.aux, extras.per_batch)
        asked.update(type(wish).__name__ for wish in wishes if wish is not None)
        asked.update({"validate"} if extras.validate else ())
        asked.update({"cached"} if extras.cached_LE is not None and extras.cached_LE.any() else ())
        return sound(adapter, params, plan, **how)

    monkeypatch.setattr(node, "local_round", noted)
    here, there = both(make_config(tmp_path, shared)(REMOTE, *overrides, "clients=3", "train.local_steps=2"))
    assert there["model_hash"] == here["model_hash"]
    assert there["refused_updates"] == here["refused_updates"] == 0
    assert (there["bytes_down"], there["bytes_up"]) == (here["bytes_down"], here["bytes_up"])
    assert asks <= asked


def failing(client: int, rounds: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let one client of the simulator fail in some rounds, counted from 0."""
    sound = training.local_round

    def local_round(adapter: Any, params: Any, plan: Any, **how: Any) -> Any:
        if plan.client == client and plan.round in rounds:
            return LocalFailure(plan.predicted, "gone")
        return sound(adapter, params, plan, **how)

    monkeypatch.setattr(training, "local_round", local_round)


def test_a_client_that_does_not_answer_is_named_and_the_others_give_the_bits_of_a_run_without_it(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path, shared)(REMOTE, "rounds=3")
    there = deployed(
        replace(config, out=f"{config.out}-remote"), lambda client, turn, answer: _lost(client, turn, answer)
    )
    with monkeypatch.context() as patched:
        failing(2, {1}, patched)
        here = run(config, observer=NullObserver())
    assert there["model_hash"] == here["model_hash"]
    told = [line for line in lines(there_out(config), "metrics.jsonl") if line["type"] == "round"]
    assert [line["refused"] for line in told] == [
        [],
        [],
        [{"client": 2, "reason": "did not answer within 60 s"}],
        [],
    ]


def _lost(client: int, turn: int, answer: bytes) -> bytes | None:
    return None if client == 2 and turn == 2 else answer


def there_out(config: Config) -> str:
    return f"{config.out}-remote"


def test_inv10_a_deployment_goes_on_after_its_server_was_killed(shared: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path, shared)(REMOTE, "rounds=3")
    here = run(config, observer=NullObserver())

    def killed(client: int, turn: int, answer: bytes) -> bytes:
        if client == 1 and turn == 2:
            raise KeyboardInterrupt
        return answer

    out = replace(config, out=there_out(config))
    with pytest.raises(KeyboardInterrupt):
        deployed(out, killed)
    words = [Words(client) for client in range(4)]
    there = resume(Path(out.out), observer=NullObserver(), founder=found_remote(Near(*words), wait=60))
    assert there["model_hash"] == here["model_hash"]


def test_the_trunk_travels_once_and_again_to_a_device_that_lost_it(shared: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path, shared)(REMOTE, "rounds=4", "seed=5")
    near = Near(*[Words(client, cache=str(tmp_path / f"device-{client}")) for client in range(4)])

    def forgetful(client: int, turn: int, answer: bytes) -> bytes:
        if client == 3 and turn == 1:
            for path in (tmp_path / "device-3").rglob("from-server/*.safetensors"):
                path.unlink()
        return answer

    near.spoil = forgetful
    deployed(config, near=near)
    down = {(line["round"], line["client"]): line["wire"]["down"] for line in lines(config.out, "ledger.jsonl")}
    trunk = 60_000
    assert [down[round, 3] - down[2, 3] > trunk for round in (1, 2, 3, 4)] == [True, False, True, False]
    assert [down[round, 0] - down[2, 0] > trunk for round in (1, 2, 3, 4)] == [True, False, False, False]
    told = [line for line in lines(config.out, "metrics.jsonl") if line["type"] == "round"]
    assert [bool(line["refused"]) for line in told] == [False, False, True, False, False]
    assert "trunk is unknown" in told[2]["refused"][0]["reason"]


def on_their_own(config: Config, folder: Path) -> Near:
    """Devices with a disk each."""
    return Near(*[Words(client, cache=str(folder / f"device-{client}")) for client in range(config.clients)])


def test_a_frozen_base_travels_once_and_again_to_a_device_that_lost_it(shared: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path, shared)(REMOTE, "rounds=5", "algorithm=flexlora", "clients=2")
    near = on_their_own(config, tmp_path)

    def forgetful(client: int, turn: int, answer: bytes) -> bytes | None:
        if client == 1 and turn in (1, 3):
            for path in (tmp_path / "device-1").rglob("*.safetensors"):
                if turn == 3 or path.parent.name == "experts":
                    path.unlink()
        return answer

    near.spoil = forgetful
    deployed(config, near=near)
    down = {(line["round"], line["client"]): line["wire"]["down"] for line in lines(config.out, "ledger.jsonl")}
    base = 8 * 2 * 3 * 32 * 16 * 4  # bytes: experts, layers, matrices of 32 x 16 in float32
    assert [down[round, 0] - down[2, 0] > base / 2 for round in (1, 2, 3, 4, 5)] == [True, *[False] * 4]
    assert [down[round, 1] - down[2, 1] > base / 2 for round in (1, 2, 3, 4, 5)] == [True, False, True, False, True]
    told = [line for line in lines(config.out, "metrics.jsonl") if line["type"] == "round"]
    assert [[fault["client"] for fault in line["refused"]] for line in told] == [[], [], [1], [], [1], []]
    assert "base of experts is unknown" in told[2]["refused"][0]["reason"]
    assert "trunk is unknown" in told[4]["refused"][0]["reason"]  # and with the trunk comes the base


def test_inv10_a_run_goes_on_over_devices_that_kept_their_base(shared: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path, shared)(REMOTE, "rounds=3", "algorithm=flexlora", "clients=2")
    here = run(config, observer=NullObserver())

    def killed(client: int, turn: int, answer: bytes) -> bytes:
        if client == 1 and turn == 2:
            raise KeyboardInterrupt
        return answer

    near, out = on_their_own(config, tmp_path), replace(config, out=there_out(config))
    near.spoil = killed
    with pytest.raises(KeyboardInterrupt):
        deployed(out, near=near)
    again = on_their_own(config, tmp_path)
    there = resume(Path(out.out), observer=NullObserver(), founder=found_remote(again, wait=60))
    assert there["model_hash"] == here["model_hash"]
    assert there["refused_updates"] == 0
    first = next(size for kind, size in near.sent if kind == "train")
    assert all(size < first for kind, size in again.sent if kind == "train")


def test_owners_bring_text_of_their_own(shared: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path, shared)(REMOTE)
    words = []
    for client in range(4):
        path = write_notes(tmp_path / f"own-{client}.jsonl", owners="wxyz"[client], lines=10)
        words.append(Words(client, text=f"jsonl:{path}", name=f"hospital {client}", budget="experts=50%"))
    summary = deployed(config, near=Near(*words))
    assert summary["refused_updates"] == 0
    assert summary["loss_after"] < summary["loss_before"]
    held = json.loads((Path(config.out) / "partition.json").read_text())
    assert held["clients"] == [f"hospital {client}" for client in range(4)]
    assert {len(line["held_LE"]) for line in lines(config.out, "metrics.jsonl") if line["type"] == "client"} == {2}


def test_who_cannot_take_part_is_named_before_anything_trains(shared: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path, shared)(REMOTE)
    four = [Words(client, name=f"site {client}") for client in range(4)]
    for words, said in (
        ([*four[:3], Words(2, name="another")], r"two devices say that they are client 2 \(another and site 2\)"),
        ([*four[:3], Words(9, name="x")], "client=9 is not in a run of 4 clients"),
        ([*four[:3], Words(3, text=f"jsonl:{tmp_path / 'none.jsonl'}")], "client 3 .* cannot take part: .*none.jsonl"),
        ([*four[:3], Words(3, data="stdlib")], "is not the text of the server"),
    ):
        with pytest.raises(ValueError, match=said):
            deployed(config, near=Near(*words))
        assert not Path(config.out, "metrics.jsonl").exists()
    with pytest.raises(ValueError, match=r"1 of 4 clients did not come within 0\.3 s: 3"):
        run(config, observer=NullObserver(), founder=found_remote(Near(*four[:3]), wait=0.3))


def test_a_device_with_another_fedmoe_is_named_by_both_versions(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path, shared)(REMOTE)
    monkeypatch.setattr("fedmoe_core.simulation.remote.node.code_version", lambda *_: "0.0.9+feedbeefcafe")
    with pytest.raises(ValueError, match=r"cannot take part: .*the server has fedmoe .*this device has 0\.0\.9\+feed"):
        deployed(config)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.timeout=0", "train.timeout=0 would wait"),
        ("cohort.clients=0", "real devices need cohort.clients=1"),
        ("eval.personal=true", "eval.personal=True is for simulations"),
        ("privacy.secure=true", "privacy.secure=true is for simulations"),
        ("privacy.drop=0.1", "privacy.drop=0.1 is for simulations"),
    ],
)
def test_what_only_a_simulation_can_do_is_refused_at_the_start(
    override: str, said: str, shared: Path, tmp_path: Path
) -> None:
    config = make_config(tmp_path, shared)(REMOTE, *override.split())
    with pytest.raises(ValueError, match=said):
        deployed(config)
