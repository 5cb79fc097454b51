"""Everything a run of a plain model needs before its first round."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fedmoe_core.algorithms.base import Algorithm, algorithm_class
from fedmoe_core.algorithms.plain_fedavg import PlainFedAvg
from fedmoe_core.budget.limits import Budget
from fedmoe_core.client.plain.trainer import PlainTrainer
from fedmoe_core.config.run_config import OWN, Config
from fedmoe_core.data.rows import deal_rows, rows_digest
from fedmoe_core.messages.profile import empty_profile
from fedmoe_core.model.plain import PlainModel, find_plain, plain_spec, plain_tensors
from fedmoe_core.privacy.central import refuse_unfit
from fedmoe_core.server.state import Population
from fedmoe_core.simulation.buffered import refuse_rounds_only
from fedmoe_core.simulation.clock.deadline import keep_deadline
from fedmoe_core.simulation.identity import Identity, code_version
from fedmoe_core.simulation.observer import Observer
from fedmoe_core.simulation.process_group import Ranks
from fedmoe_core.simulation.worlds.plain import PlainWorld
from fedmoe_core.simulation.worlds.plain_costs import PlainMeter, dense_costs, first_batch


def plain_of(config: Config, given: PlainModel | None) -> PlainModel | None:
    """Return the plain model of a run: the one given, the one that ``adapter=MODULE:NAME`` names, or None.

    Raises:
        ValueError: one was given and the configuration is of another kind of run, or the other way round.
    """
    if given is not None and config.adapter != OWN:
        raise ValueError(
            f"a plain model was given and adapter={config.adapter!r}; make the configuration with "
            'Config.load(overrides=["adapter=own"])'
        )
    if given is None and config.adapter == OWN:
        raise ValueError(
            "adapter=own is handed over in Python: simulate.run(config, adapter=plain(...)); a command takes "
            "adapter=MODULE:NAME"
        )
    return find_plain(config.adapter) if ":" in config.adapter else given


def sources_of(config: Config, plain: PlainModel | None) -> Identity:
    """Digest what a run of these words stands on, before it is founded.

    Of a plain model that is its rows and its code; its weights come from the code and the seed.

    Raises:
        ValueError, OSError: data or model cannot be used.
    """
    if plain is None:
        return Identity.of(config)
    return Identity(rows_digest(plain.train, plain.test), "", code_of(config, plain), version("torch"))


def found_plain(config: Config, plain: PlainModel, ranks: Ranks, observer: Observer) -> PlainWorld:
    """Deal the rows, make the model, measure one client's round, and found the run on them.

    Raises:
        ValueError: the data or the model cannot be used, a budget cannot be served, or the system needs experts.
    """
    torch.set_num_threads(config.threads)
    observer.on_stage("dealing rows, and measuring one client's step")
    form = _form(config)
    refuse_rounds_only(config, form)
    refuse_unfit(config, sums_alone=form.sums_alone)
    data = deal_rows(plain.train, plain.test, clients=config.clients, scheme=config.partition, seed=config.seed)
    identity, model = sources_of(config, plain), plain.build(config.seed).to(ranks.device)
    spec = plain_spec(model)
    moving = frozenset(param.key for param in spec.trained(train_dense=True))
    params = {key: tensor.clone() for key, tensor in plain_tensors(model).items()}
    trainer, data = PlainTrainer(plain, model, moving), data.to(ranks.device)
    meter = PlainMeter(trainer, params, config.train, data)
    population = Population(
        config=config,
        spec=spec,
        budgets=_budgets(config),
        costs=dense_costs(trainer, params, config.train, first_batch(data, config.train.batch_size), moving),
        samples_C=data.counts_CD.sum(axis=1),
        prior=empty_profile(0, 0),
        counts_CD=data.counts_CD,
    )
    population = keep_deadline(population, form, params)
    apart = "" if config.cohort.clients == 1 else meter.trouble()
    return PlainWorld(config, data, trainer, params, population, form(population), ranks, identity, meter, apart)


def _form(config: Config) -> type[Algorithm]:
    """The class of the system; FedAvg's is the one without experts."""
    if config.algorithm == "fedavg":
        return PlainFedAvg
    form = algorithm_class(config.algorithm)
    if not issubclass(form, PlainFedAvg):
        raise ValueError(
            f"algorithm={config.algorithm!r} chooses experts, and a plain model has none; set algorithm=fedavg, or a "
            "subclass of fedmoe_core.algorithms.plain_fedavg.PlainFedAvg"
        )
    return form


def _budgets(config: Config) -> tuple[Budget, ...]:
    """Each client's budget; shares of experts or of their bytes mean nothing here."""
    for tier in config.budgets:
        if "%" in tier or "experts" in tier:
            raise ValueError(
                f"budget {tier!r} counts experts, and a plain model has none; give bytes, operations or "
                "a device, or budgets=unlimited"
            )
    tiers = [Budget.parse(tier) for tier in config.budgets]
    return tuple(tiers[client % len(tiers)] for client in range(config.clients))


def code_of(config: Config, plain: PlainModel | None) -> str:
    """Name the code that runs: fedmoe's, and 12 hex digits over the files of the functions that a plain model is."""
    if plain is None:
        return code_version(config.adapter, config.algorithm)
    digest = sha256()
    for function in (plain.model_fn, plain.loss_fn, plain.correct_fn, plain.optimizer_fn):
        digest.update(_source(function))
    return f"{code_version(config.adapter, config.algorithm)}-{digest.hexdigest()[:12]}"


def _source(function: Callable[..., Any] | None) -> bytes:
    """The file in which a function stands; nothing where it has none (a notebook, a partial)."""
    try:
        return b"" if function is None else Path(str(inspect.getsourcefile(function))).read_bytes()
    except (OSError, TypeError):
        return b""
