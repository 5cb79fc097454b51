"""The prometheus sink's file: Prometheus' own parser reads it, it is replaced whole, and hostile names stay names."""

from __future__ import annotations

from pathlib import Path

import pytest
from own_sinks import watched
from prometheus_client.parser import text_string_to_metric_families
from tiny_runs import write_notes

from fedmoe_bindings.tracking.prometheus import PrometheusSink
from fedmoe_core.config.run_config import Config
from fedmoe_core.simulation import run as simulate
from fedmoe_core.simulation.observer import NullObserver

LINE = {"round": 2, "loss": 1.5, "loss_clients": [1.0, 2.0], "flops_total": 3e12, "seconds": 0.25, "refused": []}


def samples(path: Path) -> dict[str, dict[str, float]]:
    """What the parser finds: by name of the metric, and then by tier ("" where it has none)."""
    families = list(text_string_to_metric_families(path.read_text("utf-8")))
    assert len({family.name for family in families}) == len(families)  # each metric once, in one piece
    assert all(family.documentation for family in families)
    totals = {family.name for family in families if family.type == "counter"}
    found: dict[str, dict[str, float]] = {}
    for family in families:
        for sample in family.samples:
            assert (family.name in totals) == sample.name.endswith("_total")
            found.setdefault(sample.name, {})[sample.labels.get("tier", "")] = sample.value
    return found


def test_a_run_leaves_its_last_round_as_metrics(tmp_path: Path) -> None:
    out = tmp_path / "run"
    notes = write_notes(tmp_path / "notes.jsonl")
    summary = simulate.run(watched(notes, out, "prometheus"), observer=NullObserver())
    found = samples(out / "metrics.prom")
    assert found["fedmoe_round"] == {"": 3.0}
    assert found["fedmoe_finished"] == {"": 1.0}
    assert found["fedmoe_loss"] == {"": summary["loss_after"]}
    assert found["fedmoe_worst_client_loss"] == {"": summary["worst_client_loss"]}
    assert found["fedmoe_bytes_down_total"] == {"": summary["bytes_down"]}
    assert set(found["fedmoe_tier_loss"]) == set(Config().budgets)
    assert max(found["fedmoe_tier_worst_client_loss"].values()) == summary["worst_client_loss"]
    # The next run with --force takes the file away with the rest.
    simulate.run(watched(notes, out, ""), observer=NullObserver(), force=True)
    assert not (out / "metrics.prom").exists()


def test_each_round_replaces_the_file_where_the_setting_says(tmp_path: Path) -> None:
    file = tmp_path / "collected" / "run.prom"
    file.parent.mkdir()
    sink = PrometheusSink(Config.load(overrides=[f"watch.prometheus={file}", "clients=2"]))
    for number in (1, 2):
        sink.on_round(number, 9, {**LINE, "round": number})
        assert samples(file)["fedmoe_round"] == {"": float(number)}
    assert samples(file)["fedmoe_finished"] == {"": 0.0}
    assert samples(file)["fedmoe_rounds"] == {"": 9.0}
    assert [path.name for path in file.parent.iterdir()] == ["run.prom"]
    sink.on_round(3, 9, {"round": 3, "loss": None, "seconds": 0.25})
    assert "fedmoe_loss" not in samples(file)


def test_a_relative_file_stays_where_the_run_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Config.load(overrides=["watch.prometheus=x.prom"]).resolved().watch.prometheus == str(tmp_path / "x.prom")
    assert Config().resolved().watch.prometheus == ""


def test_names_are_escaped_as_the_format_asks(tmp_path: Path) -> None:
    evil = f'{tmp_path}/a"b\\c}} 1\n{{\x1b[2J'
    file = tmp_path / "run.prom"
    sink = PrometheusSink(Config.load(overrides=[f"out={evil}", f"watch.prometheus={file}", "clients=2"]))
    sink.on_round(2, 9, LINE)
    (family,) = [family for family in text_string_to_metric_families(file.read_text()) if family.name == "fedmoe_loss"]
    assert family.samples[0].labels["run"] == f'{tmp_path}/a"b\\c}} 1\\x0a{{\\x1b[2J'
