"""How much each expert of a model matters, by every score: the model that a run would start from, on public text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmoe_core.config.run_config import Config, SelectionConfig, is_plain
from fedmoe_core.data.batches import Batch
from fedmoe_core.model.adapter import ModelAdapter
from fedmoe_core.selection.ranking import all_scores, ranked
from fedmoe_core.simulation.observer import Observer
from fedmoe_core.simulation.prepare import local_public_batches, read_sources, warm_model
from fedmoe_core.simulation.process_group import open_ranks
from fedmoe_core.simulation.ranks.devices import pick_device
from fedmoe_core.simulation.warmup import measure_profile


@dataclass(frozen=True)
class Scoring:
    """Every score of every expert.

    Attributes:
        scores: by the names of ``selection.names.RANKINGS``, float64 (L, E); larger is more important.
        tokens_LE: tokens that each expert processed.
        tokens_L: tokens that each layer saw, padding excluded.
    """

    scores: Mapping[str, np.ndarray]
    tokens_LE: np.ndarray
    tokens_L: np.ndarray

    def facts(self, by: str) -> dict[str, Any]:
        """Return all scores in JSON's types, and each layer's expert ids ranked by one of them."""
        return {
            "by": by,
            "ranking": ranked(self.scores[by]).tolist(),
            "tokens": self.tokens_L.astype(int).tolist(),
            "tokens_by_expert": self.tokens_LE.astype(int).tolist(),
            "scores": {name: score_LE.tolist() for name, score_LE in self.scores.items()},
        }


def score_experts(
    adapter: ModelAdapter, params: dict[str, Tensor], batches: Sequence[Batch], selection: SelectionConfig
) -> Scoring:
    """Run the whole model forward and backward over ``batches`` and score its experts; nothing is trained.

    Raises:
        ValueError: there is no batch.
    """
    profile = measure_profile(adapter, params, batches)
    scores = all_scores(profile, batches=len(batches), lam=selection.lam, beta=selection.beta)
    return Scoring(scores, profile.rows_LE, profile.tokens_L)


def score_model(config: Config, *, batches: int, observer: Observer) -> Scoring:
    """Score the experts of the model that a run of ``config`` would start from, on batches of its public data.

    One process does it, whatever ``ranks`` says. A model that a run would warm up first is warmed up, or read from the
    cache.

    Raises:
        ValueError, OSError: as ``prepare.build_world``.
    """
    if is_plain(config.adapter):
        raise ValueError(f"adapter={config.adapter} is a plain model, which has no experts to score; name a MoE model")
    config = replace(config.resolved(), ranks=1)
    torch.set_num_threads(config.threads)
    with open_ranks(1, pick_device(config)) as ranks:
        sources = read_sources(config, ranks, observer)
        params = warm_model(sources, observer, train=True, before_training=lambda untrained: None)
        observer.on_stage(f"scoring experts on {batches} batches of public text")
        found = list(local_public_batches(config, sources.data, batches))
        return score_experts(sources.adapter, params, found, config.selection)
