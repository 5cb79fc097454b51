"""The mlflow sink: one MLflow run for a run of fedmoe, in the run's own folder, which no step enters twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("mlflow")  # 90 MB with what it needs: make trackers
pytest.importorskip("sqlalchemy")

from mlflow.tracking import MlflowClient
from own_sinks import stopped_and_resumed, watched
from tiny_runs import write_notes

from fedmoe_bindings.tracking.mlflow import TAG
from fedmoe_core.simulation import run as simulate


@pytest.fixture(autouse=True)
def untold(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's environment says nothing about MLflow."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_DISABLE_TELEMETRY"):
        monkeypatch.delenv(name, raising=False)


def test_a_resumed_run_is_one_mlflow_run_with_every_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where MLflow would put its files if nothing said otherwise
    monkeypatch.setattr(simulate, "HURRY", 60.0)  # it takes seconds to make its database
    out = tmp_path / "run"
    summary = stopped_and_resumed(watched(write_notes(tmp_path / "notes.jsonl"), out, "mlflow"), after=1)
    marker = json.loads((out / "fedmoe-run.json").read_text())
    client = MlflowClient(f"sqlite:///{out}/mlflow.db")
    experiment = client.get_experiment_by_name("fedmoe")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.tags[TAG] == marker["id"]
    assert (run.data.params["train.lr"], run.data.params["rounds"]) == ("0.002", "3")
    assert run.data.metrics["summary/loss_after"] == summary["loss_after"]
    losses = client.get_metric_history(run.info.run_id, "loss")
    assert sorted(metric.step for metric in losses) == [0, 1, 2, 3]
    tier = client.get_metric_history(run.info.run_id, "tier experts_12.5_/worst_client_loss")
    assert sorted(metric.step for metric in tier) == [0, 1, 2, 3]
    assert {path.name for path in tmp_path.iterdir()} == {"run", "notes.jsonl", "cache"}
