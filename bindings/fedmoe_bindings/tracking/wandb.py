"""The sink ``wandb``: a run of Weights & Biases in the run directory, offline unless WANDB_MODE says otherwise."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from fedmoe_core.config.run_config import flatten
from fedmoe_core.simulation.sinks.figures import figures_of, summary_figures
from fedmoe_core.simulation.sinks.sink import Sink


class WandbSink(Sink):
    """Logs to ``RUN/wandb``; the id is the run's, so that a resumed run goes on with its curves.

    A step that is told twice is dropped by Weights & Biases. A resumed run tells only rounds that come after it.
    Offline each start makes a directory of its own, and ``wandb sync`` puts those of one id together.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.mode = os.environ.get("WANDB_MODE", "offline")
        if self.mode == "offline":
            # Version 0.31 sends reports of its own use at the end of an offline run, unless told not to.
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self.wandb = wandb

    def on_start(self, info: Mapping[str, Any]) -> None:
        settings = self.wandb.Settings(console="off", silent=True)
        self.run = self.wandb.init(
            project=os.environ.get("WANDB_PROJECT", "fedmoe"),
            dir=self.config.out,
            id=info["run"],
            name=os.environ.get("WANDB_NAME", str(info["label"])),
            config=flatten(self.config),
            mode=self.mode,  # type: ignore[arg-type]
            resume="allow" if self.mode == "online" else None,
            settings=settings,
        )

    def last_told(self, first_round: int) -> int:
        return self.run.step - 1 if self.mode == "online" and self.run.resumed else first_round

    def on_round(self, round: int, rounds: int, record: Mapping[str, Any]) -> None:
        found = figures_of(record, self.config)
        logged: dict[str, Any] = dict(found.values)
        logged |= {f"tier {tier}/{name}": value for tier, of in found.tiers.items() for name, value in of.items()}
        for layer, worth_E in enumerate(found.importance_LE):
            logged[f"importance/layer {layer}"] = self.wandb.Histogram(np_histogram=np.histogram(worth_E))
        self.run.log(logged, step=round)

    def on_end(self, summary: Mapping[str, Any]) -> None:
        self.run.summary.update({f"summary/{name}": value for name, value in summary_figures(summary).items()})

    def close(self) -> None:
        if hasattr(self, "run"):
            self.run.finish()
