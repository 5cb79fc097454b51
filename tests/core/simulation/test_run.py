"""Whole runs on a tiny model and corpus: same bits, resumable, refusing, and inside every budget."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedmoe_core.client import train as client
from fedmoe_core.config.run_config import Config
from fedmoe_core.simulation import run as simulate
from fedmoe_core.simulation.cohorts import training
from fedmoe_core.simulation.observer import NullObserver
from fedmoe_core.simulation.prepare import build_world
from fedmoe_core.simulation.process_group import Ranks
from fedmoe_core.simulation.round import play_round

TINY = [
    "clients=4",
    "rounds=2",
    "threads=1",
    "model_config.hidden_size=32",
    "model_config.heads=2",
    "model_config.kv_heads=1",
    "model_config.head_dim=16",
    "model_config.experts=8",
    "model_config.expert_width=16",
    "model_config.vocab_size=320",
    "warmup.steps=10",
    "warmup.batch_size=4",
    "warmup.seq_len=32",
    "train.batch_size=2",
    "train.seq_len=32",
    "train.local_steps=3",
    "eval.sequences=2",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Four owners with words of their own, so that clients differ."""
    path = tmp_path_factory.mktemp("corpus") / "notes.jsonl"
    rng = np.random.default_rng(0)
    words = [[f"{owner}{''.join(rng.choice(list('aeioukrst'), 4))}" for _ in range(60)] for owner in "wxyz"]
    with path.open("w") as file:
        for owner, vocabulary in enumerate(words):
            for _ in range(40):
                text = " ".join(rng.choice(vocabulary, 60))
                file.write(json.dumps({"text": text, "client": f"owner-{owner}"}) + "\n")
    return path


@pytest.fixture
def config(corpus, tmp_path):
    def make(*overrides: str, out: str = "run") -> Config:
        cache = corpus.parent / "cache"
        where = [f"data=jsonl:{corpus}", f"out={tmp_path / out}", f"cache={cache}"]
        return Config.load(None, [*TINY, *where, *overrides])

    return make


def lines(run: Path, name: str = "metrics.jsonl", kind: str | None = None) -> list[dict]:
    found = [json.loads(line) for line in (run / name).read_text().splitlines()]
    return [line for line in found if kind is None or line["type"] == kind]


def test_a_run_writes_everything_it_promises(config, tmp_path):
    summary = simulate.run(config())
    promised = {
        *("algorithm", "seed", "rounds", "loss_before", "loss_after", "accuracy_before", "accuracy_after"),
        *("worst_client_loss", "bytes_down", "bytes_up", "flops", "peak_memory_bytes", "budget_violations"),
        *("refused_updates", "seconds", "budgeted", "corpus_sha256", "model_hash"),
    }
    run = tmp_path / "run"
    assert promised <= set(json.loads((run / "summary.json").read_text()))
    assert summary["budget_violations"] == 0
    assert summary["budgeted"]
    assert [line["round"] for line in lines(run, kind="round")] == [0, 1, 2]
    assert len(lines(run, kind="client")) == 8
    assert Config.load(run / "config.toml") == config().resolved()


def test_inv10_same_seed_same_bits_and_another_seed_others(config):
    first = simulate.run(config(out="a"))["model_hash"]
    assert simulate.run(config(out="b"))["model_hash"] == first
    assert simulate.run(config("seed=1", out="c"))["model_hash"] != first


def test_inv9_client_order_changes_nothing(config, monkeypatch):
    before = simulate.run(config(out="a"))["model_hash"]
    monkeypatch.setattr(Ranks, "mine", lambda self, items, costs: list(reversed(items)))
    assert simulate.run(config(out="b"))["model_hash"] == before


@pytest.mark.parametrize(("lam", "beta"), [(0.5, 0.1), (0.0, 3.0)])
def test_inv9_full_budget_without_thresholds_is_fedavg_bit_for_bit(config, lam, beta):
    plain = ["aggregation.gate=fedavg", "aggregation.tau=0", "aggregation.participation=false", "budgets=unlimited"]
    ours = simulate.run(config(*plain, f"selection.lam={lam}", f"selection.beta={beta}", "selection.score=s", out="a"))
    theirs = simulate.run(config("algorithm=fedavg", "budgets=unlimited", out="b"))
    assert ours["model_hash"] == theirs["model_hash"]


def test_inv9_an_expert_nobody_trained_keeps_its_bits(config):
    settings = config("budgets=experts=2", "rounds=1", "selection.explore=0").resolved()
    world = build_world(settings, Ranks(), NullObserver())
    state = world.algorithm.init(world.params)
    after, played = play_round(world, state, NullObserver())
    trained_LE = np.any([plan.trainable_LE for plan in played.plans], axis=0)
    assert not trained_LE.all()
    for layer, trained_E in enumerate(trained_LE):
        for name in ("w_in", "w_out", "router"):
            old, new = state.params[f"moe.{layer}.{name}"], after.params[f"moe.{layer}.{name}"]
            for expert in np.flatnonzero(~trained_E):
                assert torch.equal(old[expert], new[expert])
            if name != "router":  # a client that holds one expert of a layer gives its router no gradient
                assert any(not torch.equal(old[expert], new[expert]) for expert in np.flatnonzero(trained_E))


@pytest.mark.parametrize("mode", ["compact", "backward-masked"])
@pytest.mark.parametrize("algorithm", ["hfedmoe", "random"])
def test_inv1_no_budget_is_ever_exceeded(config, tmp_path, mode, algorithm):
    tiers = "budgets=experts=2;experts=25%;experts=50%;experts=16"
    summary = simulate.run(config(f"algorithm={algorithm}", f"selection.mode={mode}", tiers))
    assert summary["budget_violations"] == 0
    for entry in lines(tmp_path / "run", "ledger.jsonl"):
        assert entry["real"]["experts"] <= entry["budget"]["experts"]
        assert entry["predicted"]["experts"] <= entry["budget"]["experts"]


def test_inv1_memory_traffic_and_flops_bind_together(config, tmp_path):
    rows = simulate.dry_run(config("budgets=unlimited"))
    memory, down, flops = rows[0].predicted.memory_bytes, rows[0].predicted.bytes_down, rows[0].predicted.flops
    tight = f"budgets=memory={int(memory * 0.95)},down={int(down * 0.8)},flops={flops * 0.5}"
    summary = simulate.run(config(tight))
    assert summary["budget_violations"] == 0
    entries = lines(tmp_path / "run", "ledger.jsonl")
    for entry in entries:
        for kind in ("predicted", "real"):
            for resource in ("memory_bytes", "bytes_down", "flops"):
                assert entry[kind][resource] <= entry["budget"][resource]
    assert min(entry["real"]["experts"] for entry in entries) < 16


def test_inv1_fedavg_is_charged_for_what_it_needs_and_marked(config):
    summary = simulate.run(config("algorithm=fedavg", "budgets=experts=4"))
    assert not summary["budgeted"]
    assert summary["budget_violations"] > 0


def test_inv1_a_budget_that_is_too_small_is_refused_before_training(config, tmp_path):
    with pytest.raises(ValueError, match=r"client \d+.*at least"):
        simulate.run(config("budgets=memory=10KiB"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_inv2_predicted_memory_bounds_the_measured_peak(config, tmp_path):
    simulate.run(config("budgets=experts=2;experts=25%;experts=50%;experts=16", "train.batch_size=4"))
    for entry in lines(tmp_path / "run", "ledger.jsonl"):
        predicted, real = entry["predicted"]["memory_bytes"], entry["real"]["memory_bytes"]
        assert real <= predicted <= 1.10 * real, entry


def test_inv2_holds_under_padding_token_dropout_and_a_trained_trunk(tmp_path):
    rng = np.random.default_rng(0)
    words = [[f"{topic}{n}" for n in range(30)] for topic in ("sun", "sea", "ice")]
    table = tmp_path / "topics.csv"
    table.write_text(
        "label,text\n"
        + "".join(f"{n % 3},{' '.join(rng.choice(words[n % 3], rng.integers(10, 40)))}\n" for n in range(300))
    )
    where = [f"data=csv:{table}", f"out={tmp_path / 'run'}", f"cache={tmp_path / 'cache'}", "clients=3", "rounds=3"]
    sizes = [word for word in TINY if word.startswith(("model_config", "warmup", "threads"))]
    small = ["warmup.head_steps=5", "train.seq_len=32", "train.local_steps=3", "eval.sequences=2"]
    tiers = "budgets=experts=25%;experts=50%;experts=100%"
    summary = simulate.run(Config.load(None, [*where, *sizes, *small, "model_config.hidden_size=64", tiers]))
    assert summary["accuracy_after"] is not None
    for entry in lines(tmp_path / "run", "ledger.jsonl"):
        predicted, real = entry["predicted"]["memory_bytes"], entry["real"]["memory_bytes"]
        assert real <= predicted <= 1.10 * real, entry


def test_inv10_resume_gives_the_bits_of_a_run_never_interrupted(config, tmp_path):
    whole = simulate.run(config(out="whole"))

    class Stop(NullObserver):
        def on_round(self, round, rounds, record):
            if round == 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate.run(config(out="cut"), observer=Stop())
    resumed = simulate.resume(tmp_path / "cut")
    assert resumed["model_hash"] == whole["model_hash"]
    assert resumed["bytes_down"] == whole["bytes_down"]
    assert [line["round"] for line in lines(tmp_path / "cut", kind="round")] == [0, 1, 2]


def test_inv10_resume_before_the_first_round_was_over(config, tmp_path):
    whole = simulate.run(config(out="whole"))

    class Stop(NullObserver):
        def on_client(self, round, client, record):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate.run(config(out="cut"), observer=Stop())
    assert simulate.resume(tmp_path / "cut")["model_hash"] == whole["model_hash"]
    assert [line["round"] for line in lines(tmp_path / "cut", kind="round")] == [0, 1, 2]


def test_inv10_killed_and_resumed(config, tmp_path):
    settings = config("rounds=6", out="whole")
    whole = simulate.run(settings)
    cut = tmp_path / "cut"
    text = replace(settings, out=str(cut)).to_toml()
    (tmp_path / "cut.toml").write_text(text)
    command = [sys.executable, "-m", "fedmoe_core.cli", "simulate", str(tmp_path / "cut.toml"), "--quiet"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (cut / "checkpoint").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (cut / "checkpoint").exists(), process.stderr.read().decode()
    assert simulate.resume(cut)["model_hash"] == whole["model_hash"]
    assert [line["round"] for line in lines(cut, kind="round")] == list(range(7))


def test_inv10_stopped_before_the_first_round_ends(config, tmp_path, monkeypatch):
    settings = config(out="early")

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(simulate, "play_round", stop)
        with pytest.raises(KeyboardInterrupt):
            simulate.run(settings)
    simulate.resume(Path(settings.out))
    assert [line["round"] for line in lines(Path(settings.out), kind="round")] == list(range(settings.rounds + 1))


def test_inv11_a_client_with_nan_loss_is_refused_by_name_and_the_run_goes_on(config, tmp_path, monkeypatch):
    step = client.Stepper.step

    def poisoned(self, batch):
        loss = step(self, batch)
        return float("nan") if poison["on"] else loss

    poison = {"on": False}
    train_client = training.train_client

    def train(adapter, params, plan, batches, **rest):
        poison["on"] = plan.client == 2
        return train_client(adapter, params, plan, batches, **rest)

    monkeypatch.setattr(client.Stepper, "step", poisoned)
    monkeypatch.setattr(training, "train_client", train)
    summary = simulate.run(config())
    played = lines(tmp_path / "run", kind="round")[1:]
    assert all(line["refused"][0]["client"] == 2 and "nan" in line["refused"][0]["reason"] for line in played)
    assert summary["refused_updates"] == 2
    assert np.isfinite(summary["loss_after"])


def test_inv11_too_few_clients_left_and_the_round_is_not_applied(config, tmp_path, monkeypatch):
    train_client = training.train_client

    def train(adapter, params, plan, batches, **rest):
        result = train_client(adapter, params, plan, batches, **rest)
        broken = {key: torch.full_like(delta, float("inf")) for key, delta in result.deltas.items()}
        return replace(result, deltas=broken) if plan.client else result

    monkeypatch.setattr(training, "train_client", train)
    summary = simulate.run(config("min_clients=2"))
    assert summary["loss_after"] == summary["loss_before"]
    assert [line["applied"] for line in lines(tmp_path / "run", kind="round")[1:]] == [False, False]


def test_a_failing_client_does_not_end_the_run(config, monkeypatch):
    train_client = training.train_client

    def train(adapter, params, plan, batches, **rest):
        def broken():
            yield next(iter(batches))
            raise RuntimeError("out of memory")

        return train_client(adapter, params, plan, broken(), **rest)

    monkeypatch.setattr(training, "train_client", train)
    summary = simulate.run(config())
    assert summary["refused_updates"] == 8
    assert summary["loss_after"] == summary["loss_before"]
    assert summary["nothing_trained"].startswith(
        "all 8 updates failed or were refused; client 0 in round 1: RuntimeError"
    )


def test_an_earlier_run_is_not_overwritten(config):
    simulate.run(config("rounds=1"))
    with pytest.raises(ValueError, match="fedmoe resume"):
        simulate.run(config("rounds=1"))
    simulate.run(config("rounds=1"), force=True)


def test_resume_refuses_another_configuration(config, tmp_path):
    simulate.run(config("rounds=1"))
    path = tmp_path / "run" / "config.toml"
    path.write_text(path.read_text().replace("local_steps = 3", "local_steps = 4"))
    with pytest.raises(ValueError, match="local_steps"):
        simulate.resume(tmp_path / "run")


def test_flop_budget_is_met_by_steps_then_top_k_then_share(config, tmp_path):
    full = simulate.dry_run(config("budgets=unlimited"))[0]
    steps = simulate.dry_run(config(f"budgets=flops={full.predicted.flops * 0.7}"))[0]
    assert (steps.local_steps, steps.top_k) == (2, 2)
    less = simulate.dry_run(config(f"budgets=flops={full.predicted.flops / 3 * 0.95}"))[0]
    assert (less.local_steps, less.top_k) == (1, 1)
