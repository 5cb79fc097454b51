"""Runs under a guard of the sums: liars that pass every check, a quorum, the same bits on ranks and after a resume."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from attackers import LIARS
from small_plain import made
from tiny_runs import HOUSE, TINY, fedmoe, write_notes

from fedmoe_core.base.files import read_json_lines
from fedmoe_core.config.run_config import Config
from fedmoe_core.reporting.report import report
from fedmoe_core.simulation import run as simulate
from fedmoe_core.simulation.observer import NullObserver, Observer

PLAIN = ("adapter=own", "clients=10", "rounds=6", "threads=1", "train.batch_size=6", "train.local_steps=3")
PLAIN += ("train.lr=0.3", "partition=iid")
RULES = ("norm", "trimmed_mean", "median", "krum")
Make = Callable[..., Config]


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_notes(tmp_path_factory.mktemp("corpus") / "notes.jsonl", owners="uvwxyz")


@pytest.fixture
def language(notes: Path, tmp_path: Path) -> Make:
    """Six clients of whom two lie, of a small MoE model."""
    words = (*TINY, "clients=6", "rounds=3", f"data=jsonl:{notes}", f"cache={notes.parent / 'cache'}")
    words += ("algorithm=attackers:AttackedHFedMoE", "budgets=experts=50%;experts=100%")
    return lambda *more, out="run": Config.load(None, [*words, f"out={tmp_path / out}", *more])


def run(config: Config, observer: Observer | None = None) -> dict[str, Any]:
    plain = made() if config.adapter == "own" else None
    return simulate.run(config, adapter=plain, observer=observer or NullObserver(), force=True)


def rounds(out: Path) -> list[Mapping[str, Any]]:
    records = [line for _, line in read_json_lines(out / "metrics.jsonl", json.loads)]
    return [line for line in records if line["type"] == "round" and line["round"]]


def test_two_liars_of_ten_ruin_a_mean_and_no_rule(tmp_path: Path) -> None:
    """The changes of both pass every check: finite, in bounds, of the right shapes."""
    losses = {}
    for rule in ("none", *RULES):
        words = (f"guard.rule={rule}", "algorithm=attackers:AttackedFedAvg", f"out={tmp_path / rule}")
        summary = run(Config.load(overrides=[*PLAIN, *words]))
        losses[rule], before = summary["loss_after"], summary["loss_before"]
        assert summary["refused_updates"] == 0
        if rule != "none":
            assert {int(c) for line in rounds(tmp_path / rule) for c in line["guard"]["bounded"]} == set(LIARS)
    honest = run(Config.load(overrides=[*PLAIN, f"out={tmp_path / 'honest'}"]))["loss_after"]
    assert losses["none"] > before > 2 * losses["norm"]
    for rule in ("trimmed_mean", "median", "krum"):
        assert losses[rule] == pytest.approx(honest, abs=0.05), rule


def test_a_rule_holds_experts_of_few_voters_and_says_what_it_did(language: Make, tmp_path: Path) -> None:
    free, held = run(language(out="free")), run(language("guard.rule=median", "guard.quorum=3", out="held"))
    assert held["loss_after"] < held["loss_before"] < free["loss_after"]
    guard = held["guard"]
    assert guard["rule"] == "median", guard
    assert min(guard[key] for key in ("bounded", "few", "below_quorum")) > 0, guard
    _, (line,) = report([tmp_path / "held"])
    assert f"guard median: {guard['bounded']} scaled down" in line
    page = (tmp_path / "held" / "report.html").read_text()
    assert "What the guard did" in page
    assert f"{guard['few']} by too few clients for the rule" in page


@pytest.mark.parametrize("rule", ["median", "krum"])
def test_inv10_a_guard_has_the_bits_of_one_run_on_ranks_and_after_a_resume(
    language: Make, tmp_path: Path, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (f"guard.rule={rule}", "guard.quorum=2")
    whole = run(language(*words, out="whole"))

    class Stops(Observer):
        def on_round(self, round: int, rounds: int, record: Mapping[str, Any]) -> None:
            if round == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(language(*words, out="cut"), Stops())
    resumed = simulate.resume(tmp_path / "cut", observer=NullObserver())
    written = tmp_path / "whole.toml"
    written.write_text(language(*words).to_toml())
    monkeypatch.setenv("PYTHONPATH", str(HOUSE / "tests" / "support" / "trust"))
    ended = fedmoe("simulate", written, "ranks=2", f"out={tmp_path / 'ranks'}", "--quiet")
    assert ended.returncode == 0, ended.stderr
    ranks = json.loads((tmp_path / "ranks" / "summary.json").read_text())
    for key in ("model_hash", "guard"):
        assert whole[key] == resumed[key] == ranks[key], key
    lines = [[line["guard"] for line in rounds(tmp_path / name)] for name in ("whole", "cut", "ranks")]
    assert lines[0] == lines[1] == lines[2]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("guard.quorum=11",), "guard.quorum=11 exceeds clients=10"),
        (("clients_per_round=4", "guard.quorum=5"), "guard.quorum=5 exceeds clients_per_round=4"),
        (
            ("clients=2", "guard.rule=trimmed_mean"),
            "guard.rule=trimmed_mean compares at least 3 clients, and clients=2",
        ),
        (("clients_per_round=4", "guard.rule=krum"), "compares at least 5 clients, and clients_per_round=4"),
        (("guard.hostile=0.5",), "guard.hostile"),
        (("guard.factor=0.9",), "guard.factor"),
        (("guard.rule=average",), "guard.rule"),
        (("guard.quorum=2", "aggregation.gate=literal"), "rescales whole routers, which no guard can hold back"),
    ],
)
def test_a_guard_that_cannot_hold_is_refused(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said.replace(".", r"\.")):
        Config.load(overrides=[*words])
