"""What a run stands on once it is prepared: data, live model, warm weights, population and algorithm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from fedmoe_core.algorithms.base import Algorithm
from fedmoe_core.config.run_config import Config, TrainConfig
from fedmoe_core.data.batches import Batch, eval_batches
from fedmoe_core.data.federated import ClientData, FederatedData
from fedmoe_core.model.adapter import ModelAdapter
from fedmoe_core.privacy.chance import Secret
from fedmoe_core.server.state import Population
from fedmoe_core.simulation.cohorts.dry_step import CohortMeter
from fedmoe_core.simulation.identity import Identity
from fedmoe_core.simulation.process_group import Ranks


@dataclass(frozen=True)
class World:
    """One process's view of a run: the live model is its own, everything else is equal on all ranks."""

    config: Config
    data: FederatedData
    adapter: ModelAdapter
    params: dict[str, Tensor]  # the warm model
    population: Population
    algorithm: Algorithm
    ranks: Ranks
    identity: Identity  # of the data and the model as they were read
    cohorts: CohortMeter | None = None  # what clients need that train at once; None where each trains alone
    secret: Secret | None = None  # as ``Federation``


def local_settings(config: Config, form: type[Algorithm]) -> TrainConfig:
    """Return local training as configured, with the trunk frozen where the algorithm says so."""
    return config.train if form.trains_trunk else replace(config.train, trunk="frozen")


def validation_batches(client: ClientData, config: Config) -> Iterator[Batch]:
    """Return all of a client's validation data, in batches of the training shape; empty where it has none.

    Of the training shape, so that the pass needs no more memory than a local step.
    """
    if client.validation is not None:
        yield from eval_batches(
            client.validation,
            batch_size=config.train.batch_size,
            seq_len=config.train.seq_len,
            sequences=config.eval.validation,
        )
