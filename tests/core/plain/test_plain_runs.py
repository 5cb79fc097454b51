"""Runs of plain models: federated averaging, the same bits on ranks and in a resume, budgets, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from small_plain import blobs, cross_entropy, dropping, made, network, normed
from tiny_runs import fedmoe
from torch import Tensor, nn

from fedmoe_core import plain
from fedmoe_core.client.plain.trainer import PlainTrainer
from fedmoe_core.config.run_config import Config
from fedmoe_core.data.rows import draw_places
from fedmoe_core.model.plain import PlainModel, plain_tensors
from fedmoe_core.reporting.page import render
from fedmoe_core.reporting.results import line
from fedmoe_core.reporting.run import read_runs
from fedmoe_core.server.state import ServerState
from fedmoe_core.simulation import run as simulate
from fedmoe_core.simulation.observer import NullObserver
from fedmoe_core.simulation.process_group import Ranks
from fedmoe_core.simulation.round import Round, play_round
from fedmoe_core.simulation.worlds.found_plain import found_plain
from fedmoe_core.simulation.worlds.plain import PlainWorld

Make = Callable[..., Config]
WORDS = ("adapter=own", "clients=4", "rounds=2", "threads=1", "train.batch_size=6", "train.local_steps=3")


@pytest.fixture
def config(tmp_path: Path) -> Make:
    return lambda *words: Config.load(overrides=[*WORDS, f"out={tmp_path / 'run'}", *words])


def world_of(config: Config, model: PlainModel) -> PlainWorld:
    return found_plain(config.resolved(), model, Ranks(), NullObserver())


def played(config: Config, model: PlainModel) -> tuple[PlainWorld, ServerState, Round]:
    world = world_of(config, model)
    state, round_ = play_round(world, world.algorithm.init(world.params), NullObserver())
    return world, state, round_


def lines(out: Path, kind: str) -> list[dict[str, object]]:
    found = [json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["type"] == kind]


def test_a_round_is_the_mean_of_the_clients_by_their_rows(config: Make) -> None:
    made_config = config("train.local_epochs=2", "train.clip=0", "train.lr=0.1")
    world, state, round_ = played(made_config, made())
    by_hand = made().build(made_config.seed)
    start = {key: tensor.clone() for key, tensor in plain_tensors(by_hand).items()}
    inputs, labels = blobs(90)
    total = {key: torch.zeros_like(tensor, dtype=torch.float64) for key, tensor in start.items()}
    for client, rows in enumerate(world.data.rows_C):
        for key, tensor in plain_tensors(by_hand).items():
            tensor.copy_(start[key])
        optimizer = torch.optim.SGD(by_hand.parameters(), 0.1)
        steps = 2 * -(-len(rows) // 6)
        for places in draw_places(rows, (made_config.seed, 0, client), steps=steps, batch_size=6, by_epoch=True):
            optimizer.zero_grad()
            cross_entropy(by_hand, (inputs[places], labels[places])).backward()
            optimizer.step()
        for key, tensor in plain_tensors(by_hand).items():
            total[key] += (tensor - start[key]).double() * len(rows) / 90
    assert len({len(rows) for rows in world.data.rows_C}) > 1
    for key, old in start.items():
        moved = state.params[key].double() - old
        assert moved.norm() > 0
        # Weights have 16 bits, relative to the client of most rows.
        assert (moved - total[key]).norm() <= 1e-4 * total[key].norm(), key
    assert [update.steps for update in round_.updates] == [2 * -(-len(rows) // 6) for rows in world.data.rows_C]


def test_clients_at_once_give_what_they_give_alone(config: Make) -> None:
    _, alone, _ = played(config(), made())
    _, together, round_ = played(config("cohort.clients=2"), made())
    assert [record["clients"] for record in round_.cohorts] == [[0, 1], [2, 3]]
    for key, value in alone.params.items():
        assert (together.params[key] - value).norm() <= 1e-5 * value.norm(), key


def test_epochs_of_unequal_clients_are_apart_and_say_so(config: Make) -> None:
    _, _, round_ = played(config("cohort.clients=0", "train.local_epochs=1", "partition=dirichlet:0.5"), made())
    assert {update.alone for update in round_.updates} == {"no other client of its kind in the round"}
    _, _, round_ = played(config("cohort.clients=0", "train.local_epochs=1", "partition=iid", "clients=3"), made())
    assert [update.cohort for update in round_.updates] == [3, 3, 3]


@pytest.mark.parametrize(
    ("model_fn", "why"),
    [
        (normed, "its model has buffers"),
        (dropping, "its step cannot run for many at once (RuntimeError: vmap"),
    ],
    ids=["buffers", "draws"],
)
def test_models_that_cannot_run_at_once_run_one_by_one(
    config: Make, model_fn: Callable[[], nn.Module], why: str
) -> None:
    _, state, round_ = played(config("cohort.clients=0"), made(model_fn))
    assert all(update.alone.startswith(why) for update in round_.updates)
    _, alone, _ = played(config(), made(model_fn))
    assert all(torch.equal(state.params[key], value) for key, value in alone.params.items())


def test_running_means_are_averaged_and_counts_are_not(config: Make) -> None:
    world, state, _ = played(config("aggregation.value_bound=50"), made(normed))
    assert not torch.equal(state.params["dense.1.running_mean"], world.params["dense.1.running_mean"])
    assert torch.equal(state.params["dense.1.num_batches_tracked"], world.params["dense.1.num_batches_tracked"])


def test_frozen_parameters_stay_and_do_not_return(config: Make) -> None:
    def half_frozen() -> nn.Module:
        model = network()
        model[0].requires_grad_(False)  # type: ignore[index]
        return model

    for words in ((), ("cohort.clients=0",)):
        world, state, round_ = played(config(*words), made(half_frozen))
        for key in ("dense.0.weight", "dense.0.bias"):
            assert torch.equal(state.params[key], world.params[key])
        assert not torch.equal(state.params["dense.2.weight"], world.params["dense.2.weight"])
        assert {update.cost.bytes_up for update in round_.updates} == {4 * 27}


def test_what_clients_cost_was_predicted(config: Make) -> None:
    world, state, round_ = played(config(), made())
    assert world.population.spec.keys == set(state.params)
    for plan, update in zip(round_.plans, round_.updates, strict=True):
        assert update.cost.bytes_down == plan.predicted.bytes_down == 4 * 75
        assert update.cost.bytes_up == plan.predicted.bytes_up == 4 * 75
        # Weights twice forward, once for the gradient of the hidden layer, once each for their own: inputs need none.
        assert update.cost.flops == plan.predicted.flops == 3 * 6 * 2 * (40 * 2 + 24 * 3)
        assert 4 * 75 * 2 < plan.predicted.memory_bytes < 100_000


def test_a_count_of_batches_is_sent_once_and_does_not_return(config: Make) -> None:
    _, state, round_ = played(config("aggregation.value_bound=50"), made(normed))
    moving = sum(t.nbytes for t in state.params.values() if t.is_floating_point())
    for plan, update in zip(round_.plans, round_.updates, strict=True):
        assert plan.predicted.bytes_down == moving + 8  # one int64
        assert update.cost.bytes_up == plan.predicted.bytes_up == moving


def test_a_budget_of_operations_takes_steps_away(config: Make) -> None:
    one = 6 * 2 * (40 * 2 + 24 * 3)
    _, _, round_ = played(config(f"budgets=['flops={2 * one}', 'unlimited']"), made())
    assert [update.steps for update in round_.updates] == [2, 3, 2, 3]
    with pytest.raises(ValueError, match="cannot pay one local step; at least"):
        played(config(f"budgets=['flops={one // 2}']"), made())
    with pytest.raises(ValueError, match=r"client 0: the plan exceeds its budget \(memory: "):
        played(config("budgets=['memory=1kB']"), made())


def test_a_client_without_a_finite_loss_is_refused_alone(config: Make) -> None:
    own = [blobs(12, seed=client) for client in range(4)]
    own[2] = (own[2][0] * torch.nan, own[2][1])
    for words in ((), ("cohort.clients=0",)):
        _, state, round_ = played(config(*words), made(train=own))
        assert [update.status for update in round_.updates] == ["ok", "ok", "failed", "ok"]
        assert round_.updates[2].error == "the loss became nan at local step 1"
        assert all(value.isfinite().all() for value in state.params.values())


def test_the_sums_of_tensors_end_to_end_are_those_of_each(config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    _, whole, _ = played(config(), made())
    train = PlainTrainer.train

    def apart(self: PlainTrainer, *given: object, **words: object) -> object:
        found = train(self, *given, **words)  # type: ignore[arg-type]
        return type(found)({key: delta.clone() for key, delta in found.deltas.items()}, found.losses)

    monkeypatch.setattr(PlainTrainer, "train", apart)
    _, other, _ = played(config(), made())
    assert all(torch.equal(other.params[key], value) for key, value in whole.params.items())


def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("rounds=4", "train.lr_final=0.1", "cohort.clients=2")
    whole = simulate.run(config(*words), adapter=made(), observer=NullObserver())
    out, play = Path(config().out), simulate.play_round

    def stop(world: PlainWorld, state: ServerState, observer: object) -> tuple[ServerState, Round]:
        if state.round == 2:
            raise KeyboardInterrupt
        return play(world, state, observer)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(simulate, "play_round", stop)
        with pytest.raises(KeyboardInterrupt):
            simulate.run(config(*words), adapter=made(), observer=NullObserver(), force=True)
    with pytest.raises(ValueError, match="was made from other content of data"):
        simulate.resume(out, adapter=made(rows=91), observer=NullObserver())
    with pytest.raises(ValueError, match="adapter=own is handed over in Python"):
        simulate.resume(out, observer=NullObserver())
    assert simulate.resume(out, adapter=made(), observer=NullObserver())["model_hash"] == whole["model_hash"]
    assert [line["round"] for line in lines(out, "round")] == [0, 1, 2, 3, 4]


def test_the_same_bits_on_any_number_of_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2] / "support" / "plain"))
    hashes = set()
    for ranks in (1, 2, 4):
        words = ("adapter=small_plain:adapter", "clients=5", "rounds=2", "cohort.clients=2", "train.batch_size=6")
        out = tmp_path / str(ranks)
        done = fedmoe("simulate", "-q", *words, "threads=1", f"ranks={ranks}", f"out={out}")
        assert done.returncode == 0, done.stderr
        hashes.add(json.loads((out / "summary.json").read_text())["model_hash"])
    assert len(hashes) == 1


def test_the_report_speaks_of_no_experts(config: Make) -> None:
    summary = simulate.run(config(), adapter=made(), observer=NullObserver())
    assert summary["accuracy_after"] > summary["accuracy_before"]
    (run,) = read_runs([Path(config().out)])
    page = render([run])
    assert "expert" not in page.partition("<details")[0]
    assert "Plain model own, its own data, 4 clients" in page
    assert "worst client" not in line(run)
    assert line(run).startswith("FedAvg: held-out loss ")
    partition = json.loads((Path(config().out) / "partition.json").read_text())
    assert np.sum(partition["counts"]) == 90


def test_a_plain_model_is_planned(config: Make) -> None:
    rows = simulate.dry_run(config("budgets=['raspberry-pi-5-8gb']"), adapter=made())
    assert [row.experts for row in rows] == [0] * 4
    assert all(row.fits and row.predicted.flops > 0 for row in rows)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("adapter=own", "data=stdlib"), "adapter=own brings its own and data=stdlib"),
        (("adapter=own", "model=tiny"), "adapter=own brings its own and model=tiny"),
        (("data=own",), "adapter=transformers opens a language model and data=own"),
        (("train.local_epochs=2",), "train.local_epochs is for plain torch models"),
        (
            ("adapter=own", "train.label_smoothing=0.1"),
            "train.label_smoothing=0.1 means nothing to a plain",
        ),
        (("adapter=own", "eval.personal=true"), "eval.personal=True means nothing to a plain torch model"),
    ],
)
def test_configurations_that_mix_both_kinds_are_refused(words: tuple[str, ...], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Config.load(overrides=words)


def test_what_cannot_be_a_plain_run_is_refused_before_training(config: Make, tmp_path: Path) -> None:
    def attempt(*words: str, adapter: object = None) -> None:
        given = made() if adapter is None else adapter
        simulate.run(config(*words), adapter=given, observer=NullObserver())  # type: ignore[arg-type]

    with pytest.raises(ValueError, match="algorithm='hfedmoe' chooses experts, and a plain model has none"):
        attempt("algorithm=hfedmoe")
    with pytest.raises(ValueError, match="budget 'experts=25%' counts experts"):
        attempt("budgets=['experts=25%']")
    with pytest.raises(ValueError, match="model_fn returned int"):
        attempt(adapter=made(lambda: 3))  # type: ignore[arg-type,return-value]
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        attempt(adapter=made(nn.Tanh))
    with pytest.raises(ValueError, match=r"loss_fn returned a tensor of shape \(6,\); return one number"):
        attempt(adapter=plain(network, lambda model, batch: model(batch[0]).sum(1), train=blobs(30), test=blobs(5)))
    with pytest.raises(
        ValueError, match=r"correct_fn raised KeyError: 'labels', on a batch of shapes \[\(6, 5\), \(6,\)\]"
    ):
        attempt(adapter=made(correct_fn=lambda model, batch: {}["labels"]))
    with pytest.raises(ValueError, match="a plain model was given and adapter='transformers'"):
        simulate.run(Config(), adapter=made())
    with pytest.raises(ValueError, match="loss_fn is a int; give a function"):
        plain(network, 3, train=blobs(5), test=blobs(5))  # type: ignore[arg-type]
    assert not (tmp_path / "run" / "config.toml").exists()


@pytest.mark.parametrize(
    ("place", "match"),
    [("nowhere:adapter", "No module named 'nowhere'"), ("small_plain:blobs", "is a function; make it with")],
)
def test_a_place_that_holds_no_plain_model_is_refused(place: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        simulate.run(Config.load(overrides=[f"adapter={place}"]))


def test_a_system_of_ones_own_takes_the_servers_step(config: Make) -> None:
    whole = played(config(), made())[1].params
    _, halved, _ = played(config("algorithm=halving:Halving"), made())
    start: dict[str, Tensor] = world_of(config(), made()).params
    for key, old in start.items():
        torch.testing.assert_close(halved.params[key], old + (whole[key] - old) / 2, rtol=1e-5, atol=1e-6)


def test_plain_models_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2] / "support" / "plain"))
    words = ("adapter=small_plain:adapter", "clients=3", "rounds=2", "train.batch_size=6", "threads=1")
    options = ("--systems", "fedavg,halving:Halving", "--seeds", "0-1", "--out", tmp_path, "-q")
    done = fedmoe("compare", *words, *options)
    assert done.returncode == 0, done.stderr
    assert "| system | seeds | global | clients | mean test rows |" in done.stdout
    again = fedmoe("compare", *words, *options)  # what is there is found to be of this code and these rows
    assert again.returncode == 0, again.stderr
    assert "came from fedmoe" not in again.stdout + again.stderr
