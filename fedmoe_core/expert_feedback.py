"""How well a client's trained sub-model does by expert: each answers for the samples that reach it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from fedmoe_core.probe import Bench


@dataclass(frozen=True)
class ExpertFeedback:
    """Loss and accuracy of the trained sub-model by expert, (3, L, E): rows, rows x loss, rows x share that is right.

    l_ce = (1/|D_ce|) sum of l(x, y) over D_ce, the samples routed to e [N]. A sample's tokens go to several experts, so
    it counts for each by the rows that it sends there [E]. Samples run one at a time: losses are known by batch.
    """

    samples: int

    def __call__(self, bench: Bench) -> dict[str, Tensor]:
        layers = bench.adapter.moe
        sums_3LE = np.zeros((3, len(layers), bench.adapter.spec.num_experts))
        single = (batch.one(n) for batch in bench.batches() for n in range(len(batch)))
        for layer in layers:
            layer.keep_logits = True
        for sample in islice(single, self.samples):
            found = bench.adapter.evaluate(sample)
            rows_LE = np.stack([layer.chosen_rows_E() for layer in layers])
            worth_3 = np.array([1.0, found.loss_sum / found.count, found.correct / found.count])
            sums_3LE += worth_3[:, None, None] * rows_LE
        for layer in layers:
            layer.keep_logits = False
            layer.forget_logits()
        return {"feedback": torch.from_numpy(sums_3LE)}
