"""The sink ``tensorboard``: event files in the run directory, by torch's own writer; nothing is sent anywhere."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from fedmoe_core.config.run_config import flatten
from fedmoe_core.simulation.sinks.figures import figures_of, summary_figures
from fedmoe_core.simulation.sinks.sink import Sink


class TensorBoardSink(Sink):
    """Writes ``RUN/tensorboard``.

    Every start purges: TensorBoard then shows nothing that earlier files of the directory hold, and a resumed run tells
    all its rounds again. So no step is doubled or missing, whatever a kill took and whatever run lay there before.
    """

    def on_start(self, info: Mapping[str, Any]) -> None:
        self.writer = SummaryWriter(str(Path(self.config.out) / "tensorboard"), purge_step=0)
        settings = {k: ";".join(v) if isinstance(v, tuple) else v for k, v in flatten(self.config).items()}
        for part in hparams(settings, {"loss": 0.0, "worst_client_loss": 0.0})[:2]:  # what is compared, and with what
            self.writer.file_writer.add_summary(part)  # type: ignore[attr-defined] # None once closed

    def last_told(self, first_round: int) -> int:
        return -1

    def on_round(self, round: int, rounds: int, record: Mapping[str, Any]) -> None:
        found = figures_of(record, self.config)
        curves = dict(found.values)
        for place, (tier, figures) in enumerate(found.tiers.items()):
            curves |= {f"tier_{place}_{re.sub(r'[^-/.0-9A-Za-z]+', '_', tier)}/{k}": v for k, v in figures.items()}
        for name, value in curves.items():
            self.writer.add_scalar(name, value, round)
        if found.importance_LE:
            worth_LE = np.asarray(found.importance_LE, np.float64)
            for layer, worth_E in enumerate(worth_LE):
                self.writer.add_histogram(f"importance/layer_{layer}", worth_E, round)
            low, high = worth_LE.min(), worth_LE.max()
            gray_LE = (255 * (worth_LE - low) / (high - low or 1.0)).astype(np.uint8)
            # A square of 8 x 8 for each expert: layers downwards, experts to the right.
            self.writer.add_image("importance", gray_LE.repeat(8, 0).repeat(8, 1), round, dataformats="HW")
        self.writer.flush()  # by default after two minutes; a kill takes what was not flushed

    def on_end(self, summary: Mapping[str, Any]) -> None:
        for name, value in summary_figures(summary).items():
            self.writer.add_scalar(f"summary/{name}", value, int(summary["rounds"]))

    def close(self) -> None:
        if hasattr(self, "writer"):
            self.writer.close()
