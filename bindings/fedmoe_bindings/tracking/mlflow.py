"""The sink ``mlflow``: a run of MLflow, in a file of the run directory unless MLFLOW_TRACKING_URI says otherwise."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedmoe_core.config.run_config import flatten
from fedmoe_core.simulation.sinks.figures import figures_of, summary_figures
from fedmoe_core.simulation.sinks.sink import Sink

TAG = "fedmoe.run"  # of an MLflow run: the id of the run that it is of
AT_ONCE = 100  # parameters that MLflow takes in one call


class MlflowSink(Sink):
    """Logs to ``RUN/mlflow.db`` by MLflow's client; a resumed run goes on with the MLflow run that has its id.

    MLflow keeps a step that is told twice twice, so each round logs its number too, and a resumed run tells the rounds
    after the last that MLflow has. Importance is left out: MLflow has no histograms.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it reports its use over the network otherwise
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        from mlflow import entities, tracking

        self.entities, self.tracking = entities, tracking
        self.ended = False

    def on_start(self, info: Mapping[str, Any]) -> None:
        place = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(self.config.out).absolute()}/mlflow.db"
        self.client = self.tracking.MlflowClient(tracking_uri=place)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "fedmoe")
        known = self.client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self.client.create_experiment(name)
        before = self.client.search_runs([experiment], f"tags.`{TAG}` = '{info['run']}'")
        if before:
            self.id = before[0].info.run_id
            self.client.update_run(self.id, status="RUNNING")
            return
        self.id = self.client.create_run(experiment, run_name=str(info["label"]), tags={TAG: info["run"]}).info.run_id
        settings = [self.entities.Param(key, str(value)[:500]) for key, value in flatten(self.config).items()]
        for first in range(0, len(settings), AT_ONCE):
            self.client.log_batch(self.id, params=settings[first : first + AT_ONCE])

    def last_told(self, first_round: int) -> int:
        return int(self.client.get_run(self.id).data.metrics.get("round", -1))

    def on_round(self, round: int, rounds: int, record: Mapping[str, Any]) -> None:
        found = figures_of(record, self.config)
        tiers = {f"tier {tier}/{name}": value for tier, of in found.tiers.items() for name, value in of.items()}
        self._log({**found.values, **tiers, "round": round}, round)

    def on_end(self, summary: Mapping[str, Any]) -> None:
        self._log(
            {f"summary/{name}": value for name, value in summary_figures(summary).items()}, int(summary["rounds"])
        )
        self.ended = True

    def close(self) -> None:
        if hasattr(self, "id"):
            self.client.set_terminated(self.id, "FINISHED" if self.ended else "KILLED")

    def _log(self, values: Mapping[str, float], step: int) -> None:
        now = int(1000 * time.time())
        named = {re.sub(r"[^\w\-. :/]+", "_", name): value for name, value in values.items()}
        self.client.log_batch(self.id, [self.entities.Metric(name, value, now, step) for name, value in named.items()])
