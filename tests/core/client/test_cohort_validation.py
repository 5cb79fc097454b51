"""Validation of a cohort: what each sub-model shows alone, however many batches and sequences the others have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_corpus import make_config

from fedmoe_core.client.cohort.validation import validate_cohort
from fedmoe_core.client.profiling import validate
from fedmoe_core.config.run_config import Config
from fedmoe_core.data.batches import Batch
from fedmoe_core.simulation.observer import NullObserver
from fedmoe_core.simulation.prepare import build_world, local_public_batches
from fedmoe_core.simulation.process_group import Ranks

Make = Callable[..., Config]
SEQUENCES = ((2, 2, 1), (), (1,), (2, 2))  # of each batch of each client


@pytest.fixture
def config(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    return make_config(tmp_path, tmp_path_factory.getbasetemp() / "tiny")


def cut(batch: Batch, sequences: int, client: int) -> Batch:
    """So many sequences of a batch, the last one with some padding."""
    mask_SN = batch.mask_SN[:sequences].clone()
    mask_SN[-1, 20 + client :] = False
    return Batch(batch.tokens_SN[:sequences], mask_SN, None if batch.labels_S is None else batch.labels_S[:sequences])


@pytest.mark.parametrize("labeled", [False, True])
def test_each_client_is_validated_as_it_is_alone(config: Make, labeled: bool) -> None:
    words = ("cohort.clients=4", "clients=4", "train.trunk=frozen", "budgets=['experts=25%', 'unlimited']")
    world = build_world(config(*words, labeled=labeled).resolved(), Ranks(), NullObserver())
    drawn = iter(list(local_public_batches(world.config, world.data, 8)))
    batches = [[cut(next(drawn), count, client) for count in counts] for client, counts in enumerate(SEQUENCES)]
    plans = world.algorithm.plan(world.algorithm.init(world.params), range(4))
    submodels = [plan.submodel(train_dense=False) for plan in plans]
    priors = [torch.linspace(-1.0, client, 3) for client in range(4)] if labeled else None
    alone = []
    for client, submodel in enumerate(submodels):
        world.adapter.configure(world.params, submodel)
        prior_C = None if priors is None else priors[client]
        alone.append(validate(world.adapter, batches[client], log_prior_C=prior_C) if batches[client] else None)
    cohort = world.adapter.become_cohort(world.params, submodels, tokens=64, joined=lambda client: None)  # type: ignore[attr-defined]
    together = validate_cohort(cohort, batches, log_priors=priors)
    assert alone[1] is None
    assert together[1] is None
    for client in (0, 2, 3):
        one, other = alone[client], together[client]
        assert one is not None
        assert other is not None
        assert other.total.loss_sum == pytest.approx(one.total.loss_sum, rel=1e-5)
        assert (other.total.count, other.total.correct) == (one.total.count, one.total.correct)
        for found, want in ((other.profile, one.profile), (other.feedback, one.feedback)):
            for name, value in vars(want).items():
                np.testing.assert_allclose(getattr(found, name), value, rtol=1e-5, atol=1e-7, err_msg=name)
        assert one.profile.rows_LE.sum() > 0
