"""Personal evaluation: each client's own model on its own data, by tier, also where no global model exists."""

from __future__ import annotations

import json
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_corpus import make_config

from fedmoe_core.config.run_config import Config
from fedmoe_core.data.batches import Batch, eval_batches
from fedmoe_core.model.spec import Evaluation
from fedmoe_core.model.submodel import SubModel
from fedmoe_core.reporting.report import report
from fedmoe_core.reporting.results import line, quality_of
from fedmoe_core.reporting.run import read_runs
from fedmoe_core.simulation import run as simulate
from fedmoe_core.simulation.evaluation import evaluate, evaluate_clients
from fedmoe_core.simulation.observer import NullObserver
from fedmoe_core.simulation.prepare import build_world
from fedmoe_core.simulation.process_group import Ranks
from fedmoe_core.simulation.progress import RoundLines

Make = Callable[..., Config]
TIERS = "budgets=experts=25%;experts=100%"


@pytest.fixture
def config(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    return make_config(tmp_path, tmp_path_factory.getbasetemp() / "tiny")


def summary_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return found


def test_each_clients_model_is_its_next_plan_on_its_own_data(config: Make) -> None:
    world = build_world(config(TIERS, "eval.personal=true").resolved(), Ranks(), NullObserver())
    state = world.algorithm.init(world.params)
    held = evaluate_clients(world, state)
    assert held.personal_loss_C is not None
    assert held.personal_accuracy_C is None
    for client, loss in enumerate(held.personal_loss_C):
        plan = world.algorithm.plan(state, [client])[0]
        world.adapter.configure(state.params, SubModel(permitted_LE=plan.permitted_LE, top_k=plan.top_k))
        test = world.data.clients[client].test
        batches = eval_batches(test, batch_size=32, seq_len=32, sequences=2)
        found = evaluate(world.adapter, batches)
        assert loss == found.loss_sum / found.count
        # The whole model is the global one, which judges the clients' windows together.
        assert (loss == pytest.approx(held.loss_C[client], rel=1e-6)) == plan.permitted_LE.all()


@pytest.mark.parametrize("labeled", [False, True], ids=["text", "classes"])
def test_clients_judged_together_get_what_each_gets_alone(config: Make, labeled: bool) -> None:
    """Three clients of a few sequences in one forward."""
    made = config("clients=3", labeled=labeled).resolved()
    world = build_world(made, Ranks(), NullObserver())
    state, calls = world.algorithm.init(world.params), list[tuple[int, ...]]()
    parts = world.adapter.evaluate_parts  # type: ignore[attr-defined]

    def counted(batch: Batch, sizes: list[int]) -> list[Evaluation]:
        calls.append(tuple(sizes))
        return parts(batch, sizes)  # type: ignore[no-any-return]

    world.adapter.evaluate_parts = counted  # type: ignore[attr-defined]
    together = evaluate_clients(world, state)
    assert [len(sizes) for sizes in calls] == [3]
    world.adapter.configure(world.params)
    for client, data in enumerate(world.data.clients):
        found = evaluate(
            world.adapter, eval_batches(data.test, batch_size=32, seq_len=32, sequences=made.eval.sequences)
        )
        assert together.loss_C is not None
        assert together.loss_C[client] == pytest.approx(found.loss_sum / found.count, rel=1e-6)
        if labeled:
            assert together.accuracy_C is not None
            assert together.accuracy_C[client] == found.correct / found.count


@pytest.mark.parametrize(
    "words",
    [
        ("algorithm=hfedmoe",),
        ("algorithm=flex_moe",),
        ("algorithm=hetlora", "budgets=unlimited"),
        ("algorithm=fft_moe", "budgets=unlimited"),
        ("algorithm=toy:Toy", "budgets=unlimited"),
    ],
    ids=lambda words: words[0],
)
@pytest.mark.parametrize("labeled", [False, True], ids=["text", "classes"])
def test_own_models_judged_together_get_what_each_gets_alone(
    config: Make, words: tuple[str, ...], labeled: bool
) -> None:
    """The parts differ in length, and a part has more sequences than a batch of training."""
    limits = ("clients=3", "train.trunk=frozen", "train.logit_adjustment=1.0", "eval.personal=true", "eval.sequences=5")
    words = (TIERS, *words, *(limits if labeled else tuple(word for word in limits if "logit" not in word)))
    alone, together = (
        build_world(config(*words, f"cohort.clients={most}", labeled=labeled).resolved(), Ranks(), NullObserver())
        for most in (1, 2)
    )
    for world in (alone, together):
        short = world.data.clients[1]
        object.__setattr__(short, "test", short.test.take(np.arange(3 if labeled else 1)))
    cohorts = list[int]()
    become = together.adapter.become_cohort  # type: ignore[attr-defined]

    def counted(params: Any, submodels: list[SubModel], **rest: Any) -> Any:
        cohorts.append(len(submodels))
        return become(params, submodels, **rest)

    state, other = (world.algorithm.init(world.params) for world in (alone, together))
    evaluate_clients(together, other)  # the dry step of a pair, which bounds a cohort's memory, is measured once
    together.adapter.become_cohort = counted  # type: ignore[attr-defined]
    found, want = evaluate_clients(together, other), evaluate_clients(alone, state)
    assert cohorts == [2]
    assert found.personal_loss_C == pytest.approx(want.personal_loss_C, rel=1e-5)
    assert found.personal_accuracy_C == want.personal_accuracy_C
    assert len(set(want.personal_loss_C or ())) == 3


def test_a_clients_own_classifier_keeps_the_class_shares_that_its_training_assumed(config: Make) -> None:
    """Logits + tau * log shares is what training fitted; the global model answers without them."""
    words = ("algorithm=fedavg", "eval.personal=true", "budgets=unlimited")
    tau = 0.7
    made = config(*words, f"train.logit_adjustment={tau}", labeled=True).resolved()
    world = build_world(made, Ranks(), NullObserver())
    held = evaluate_clients(world, world.algorithm.init(world.params))
    world.adapter.configure(world.params)
    for client, data in enumerate(world.data.clients):
        counts_C = world.data.counts_CD[client] + 1.0
        batches = list(eval_batches(data.test, batch_size=32, seq_len=32, sequences=made.eval.sequences))
        bare = evaluate(world.adapter, batches)
        assert held.loss_C[client] == pytest.approx(bare.loss_sum / bare.count, rel=1e-6)
        logits_SC = torch.cat([world.adapter.model(b.tokens_SN, b.mask_SN) for b in batches]).detach().double()
        adjusted_SC = logits_SC + tau * torch.from_numpy(np.log(counts_C / counts_C.sum()))
        labels_S = torch.cat([batch.labels_S for batch in batches])
        loss = torch.nn.functional.cross_entropy(adjusted_SC, labels_S)
        assert held.personal_loss_C[client] == pytest.approx(float(loss), rel=1e-4)
        right = (adjusted_SC.argmax(dim=1) == labels_S).double().mean()
        assert held.personal_accuracy_C[client] == pytest.approx(float(right))
    plain = build_world(config(*words, "train.logit_adjustment=0", labeled=True).resolved(), Ranks(), NullObserver())
    held = evaluate_clients(plain, plain.algorithm.init(plain.params))
    assert held.personal_loss_C == pytest.approx(held.loss_C, rel=1e-6)


def test_fedavg_deploys_everything_to_everybody(config: Make) -> None:
    world = build_world(config("algorithm=fedavg", TIERS, "eval.personal=true").resolved(), Ranks(), NullObserver())
    held = evaluate_clients(world, world.algorithm.init(world.params))
    assert held.personal_loss_C == pytest.approx(held.loss_C, rel=1e-6)


@pytest.mark.parametrize("labeled", [True, False])
def test_records_and_summary_hold_every_client_and_every_tier(config: Make, tmp_path: Path, labeled: bool) -> None:
    simulate.run(config(TIERS, "eval.personal=true", "rounds=1", labeled=labeled))
    summary = summary_of(tmp_path / "run")
    rounds = [json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    last = rounds[-1]
    assert summary["personal_loss_C"] == last["personal_loss_C"]
    assert summary["personal_accuracy_C"] == last["personal_accuracy_C"]
    assert (summary["personal_accuracy_C"] is not None) == labeled
    assert list(summary["personal_tiers"]) == ["experts=25%", "experts=100%"]
    small = summary["personal_tiers"]["experts=25%"]
    members = summary["personal_loss_C"][::2]
    assert small["clients"] == len(members) == 2
    assert small["loss_mean"] == pytest.approx(np.mean(members), rel=1e-12)
    assert small["loss_worst"] == max(members)
    if labeled:
        assert small["accuracy_worst"] == min(summary["personal_accuracy_C"][::2])
    page, _ = report([tmp_path / "run"])
    assert "own models" in page.read_text()


def test_without_being_asked_nothing_personal_is_evaluated(config: Make, tmp_path: Path) -> None:
    simulate.run(config(TIERS, "rounds=1"))
    summary = summary_of(tmp_path / "run")
    assert summary["personal_loss_C"] is None
    assert summary["personal_tiers"] is None
    assert summary["loss_after"] is not None


def test_a_system_without_a_global_model_is_judged_by_its_clients_own(
    config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate.run(config("algorithm=fedavg", "eval.personal=true", "budgets=unlimited", out_name="fedavg"))
    simulate.run(config("algorithm=toy:Toy", "eval.personal=true", "budgets=unlimited", out_name="toy"))
    summary = summary_of(tmp_path / "toy")
    assert [summary[key] for key in ("loss_before", "loss_after", "accuracy_after")] == [None, None, None]
    assert summary["worst_client_loss"] == max(summary["personal_loss_C"])
    runs = read_runs([tmp_path / "toy", tmp_path / "fedavg"])
    quality = quality_of(runs)
    assert quality.name == "held-out loss of the clients' own models"
    assert all(quality.gain(run) is not None for run in runs)
    page, lines = report([run.path for run in runs], out=tmp_path / "both.html")
    assert "Sorted by final held-out loss of the clients' own models" in unescape(page.read_text("utf-8"))
    assert "n/a -> n/a" in lines[0]
    alone, _ = report([tmp_path / "toy"])
    assert "mean loss of the clients' own models" in unescape(alone.read_text("utf-8"))
    (tmp_path / "toy" / "summary.json").unlink()  # as an interrupted run
    (cut,) = read_runs([tmp_path / "toy"])
    assert "own models" in line(cut)
    assert not cut.has_accuracy


def test_the_progress_line_shows_own_models_where_there_is_no_global_loss() -> None:
    (text,) = RoundLines().of(1, 2, {"loss": None, "personal_loss_C": [1.0, 3.0], "refused": []})
    assert "held-out" not in text
    assert "own models 2.000" in text
    assert "worst client 3.000" in text
