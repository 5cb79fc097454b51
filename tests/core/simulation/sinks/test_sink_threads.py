"""Sinks see every round, and none of them can hurt a run: not by raising, not by hanging, not by being missing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from own_sinks import StopsAfter, install, stopped_and_resumed, watched
from tiny_runs import write_notes

from fedmoe_core.config.run_config import Config
from fedmoe_core.simulation import run as simulate
from fedmoe_core.simulation.observer import NullObserver
from fedmoe_core.simulation.process_group import Ranks
from fedmoe_core.simulation.sinks import guard
from fedmoe_core.simulation.sinks.guard import Watched
from fedmoe_core.simulation.sinks.sink import Sink, find_sinks


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_notes(tmp_path_factory.mktemp("notes") / "notes.jsonl")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "site"
    place.mkdir()
    install(place, monkeypatch)


def told(out: Path) -> list[list[Any]]:
    return [json.loads(line) for line in (out / "told.jsonl").read_text().splitlines()]


def test_inv10_a_sink_is_told_all_on_one_thread_and_changes_no_bit(notes: Path, tmp_path: Path, site: None) -> None:
    bare = simulate.run(watched(notes, tmp_path / "bare", ""), observer=NullObserver())
    summary = simulate.run(watched(notes, tmp_path / "seen", "recorder"), observer=NullObserver())
    assert summary["model_hash"] == bare["model_hash"]
    assert summary["peak_memory_bytes"] == bare["peak_memory_bytes"]
    found = told(tmp_path / "seen")
    assert [what[0] for what in found] == ["start", "round", "round", "round", "round", "end", "close"]
    assert [what[1] for what in found if what[0] == "round"] == [0, 1, 2, 3]
    assert {what[-1] for what in found} == {"sink recorder"}
    marker = json.loads((tmp_path / "seen" / "fedmoe-run.json").read_text())
    assert found[0][1:4] == [marker["id"], False, 0]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("raisesatstart", "failed (ConnectionError: no such server) and is off for the rest of this run"),
        ("raisesinrounds", "failed (OSError: [Errno 28] No space left on device) and is off"),
        ("raisesatend", "failed (RuntimeError: the end)"),
        ("hangs", "was not done when the run ended"),
    ],
)
def test_a_sink_that_fails_is_named_once_and_the_run_and_the_other_sinks_go_on(
    notes: Path, tmp_path: Path, site: None, monkeypatch: pytest.MonkeyPatch, capsys: Any, name: str, said: str
) -> None:
    monkeypatch.setattr(simulate, "PATIENCE", 2.0)
    summary = simulate.run(watched(notes, tmp_path / "run", f"{name}, recorder"), observer=NullObserver())
    assert summary["rounds"] == 3
    assert [what[1] for what in told(tmp_path / "run") if what[0] == "round"] == [0, 1, 2, 3]
    err = capsys.readouterr().err
    assert err.count("warning: ") == 1
    assert f"warning: watch.sinks={name} {said}" in err


def test_a_sink_that_falls_behind_is_off(
    tmp_path: Path, site: None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(guard, "WAITING", 5)
    shown = Watched(NullObserver(), find_sinks(Config.load(overrides=["watch.sinks=hangs"])))
    shown.on_start({"first_round": 0, "resumed": False, "rounds": 20})
    for number in range(20):
        shown.on_round(number, 20, {})
    shown.finish(0.1)
    err = capsys.readouterr().err
    assert err == "warning: watch.sinks=hangs is 5 rounds behind and is off for the rest of this run\n"


def test_a_run_that_stops_early_closes_its_sinks(notes: Path, tmp_path: Path, site: None) -> None:
    with pytest.raises(KeyboardInterrupt):
        simulate.run(watched(notes, tmp_path / "run", "recorder"), observer=StopsAfter(1))
    assert [what[0] for what in told(tmp_path / "run")] == ["start", "round", "round", "close"]


@pytest.mark.parametrize(("name", "again"), [("recorder", []), ("forgetful", [1])])
def test_a_resumed_run_tells_each_sink_the_rounds_that_it_lacks(
    notes: Path, tmp_path: Path, site: None, name: str, again: list[int]
) -> None:
    stopped_and_resumed(watched(notes, tmp_path / "run", name), after=1)
    found = told(tmp_path / "run")
    starts = [what for what in found if what[0] == "start"]
    assert [(run, resumed, first) for _, run, resumed, first, _ in starts] == [
        (starts[0][1], False, 0),
        (starts[0][1], True, 1),
    ]
    rounds = [what[1:3] for what in found if what[0] == "round"]
    assert [number for number, _ in rounds] == [0, 1, *again, 2, 3]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {line["round"]: line["loss"] for line in lines if line["type"] == "round"}
    assert rounds == [[number, losses[number]] for number, _ in rounds]


def test_a_run_may_get_a_sink_when_it_is_resumed(notes: Path, tmp_path: Path, site: None) -> None:
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        simulate.run(watched(notes, out, ""), observer=StopsAfter(2))
    text = (out / "config.toml").read_text()
    (out / "config.toml").write_text(text.replace('sinks = ""', 'sinks = "forgetful"'))
    simulate.resume(out, observer=NullObserver())
    assert [what[1] for what in told(out) if what[0] == "round"] == [1, 2, 3]


def test_a_name_that_is_not_there_and_a_sink_that_does_not_load_are_refused_before_anything_trains(
    tmp_path: Path, site: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, said in {
        "recordr": r"watch\.sinks='recordr' is unknown; did you mean 'recorder'\? valid: absent, ",
        "absent": r"sinks=absent cannot be loaded \(No module named 'no_such_module'\); install its package again, or",
        "cannotbemade": r"watch\.sinks=cannotbemade cannot be made \(wrong version\); mend that, or leave it out",
    }.items():
        config = Config.load(overrides=[f"out={tmp_path / 'run'}", f"watch.sinks=recorder,{name}"])
        with pytest.raises(ValueError, match=said):
            simulate.run(config, observer=NullObserver())
        assert not (tmp_path / "run").exists()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.delitem(sys.modules, "fedmoe_bindings.tracking.tensorboard", raising=False)
    with pytest.raises(ValueError, match=r"pip install 'fedmoe-core\[tensorboard\]', or leave it out"):
        find_sinks(Config.load(overrides=["watch.sinks=tensorboard"]))


def test_only_rank_0_makes_sinks(tmp_path: Path, site: None) -> None:
    config = Config.load(overrides=[f"out={tmp_path}", "watch.sinks=recorder,hangs"])
    assert all(isinstance(sink, Sink) for sink in find_sinks(config).values())
    bad = Config.load(overrides=[f"out={tmp_path}", "watch.sinks=nothing-of-that-name"])
    with simulate._watching(bad, None, Ranks(rank=1)) as shown:
        assert type(shown) is NullObserver
