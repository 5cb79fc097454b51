"""Everything a run needs before its first round: data, warm model, calibrated costs, budgets and algorithm."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from fedmoe_core.algorithms.base import Algorithm, algorithm_class
from fedmoe_core.base.rng import counter_seed
from fedmoe_core.budget.cost_model import CostModel
from fedmoe_core.budget.limits import Budget, Cost
from fedmoe_core.config.run_config import Config, TrainConfig, is_dense
from fedmoe_core.data.batches import Batch, public_batches
from fedmoe_core.data.federated import FederatedData, load_data
from fedmoe_core.data.tokenizing import TextTokenizer, pretrained_tokenizer
from fedmoe_core.layer.lora import LoraSpec
from fedmoe_core.model.adapter import ModelAdapter, find_adapter
from fedmoe_core.model.cohort import CohortAdapter
from fedmoe_core.model.spec import ModelSpec
from fedmoe_core.privacy.central import refuse_unfit
from fedmoe_core.server.agreement import refuse_hidden
from fedmoe_core.server.state import Population
from fedmoe_core.simulation.buffered import refuse_rounds_only
from fedmoe_core.simulation.calibrate import calibrate
from fedmoe_core.simulation.clock.deadline import keep_deadline
from fedmoe_core.simulation.cohorts.dry_step import CohortMeter
from fedmoe_core.simulation.identity import Identity, code_version
from fedmoe_core.simulation.observer import Observer
from fedmoe_core.simulation.process_group import Ranks
from fedmoe_core.simulation.warmup import cached_warmup, measure_profile, warm_up, warmup_key
from fedmoe_core.simulation.world import local_settings, validation_batches
from fedmoe_core.simulation.worlds.dense import find_splitter, split_of
from fedmoe_core.simulation.worlds.moe import MoEWorld

PRIOR_STEPS = 8  # batches of the server's own pass over public data, as many as a client's round has by default


def cache_directory(config: Config) -> Path:
    """Return where warm-ups and encoded corpora are kept: ``cache``, else fedmoe under the user's cache directory.

    In it every version of the code has its own folder, so that none reads what another one made.
    """
    base = Path(config.cache) if config.cache else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return (base if config.cache else base / "fedmoe") / code_version(config.adapter)


@dataclass(frozen=True)
class Sources:
    """What a run is made from, before anything has been trained or measured.

    Attributes:
        config, form: the resolved configuration and the algorithm's class, which declares the model's form.
        data, adapter, identity: the data, the live model, and the digests of both.
        ranks: this process among its peers.
    """

    config: Config
    form: type[Algorithm]
    data: FederatedData
    adapter: ModelAdapter
    identity: Identity
    ranks: Ranks


def build_world(config: Config, ranks: Ranks, observer: Observer, *, train_warmup: bool = True) -> MoEWorld:
    """Read the sources, make or load the warm model, and found the world on it.

    Args:
        config: resolved.
        ranks: this process among its peers; rank 0 fills the cache, the others then read it.
        observer: told of each stage.
        train_warmup: False uses a cached warm-up if there is one, else the untrained model (for dry runs).

    Raises:
        ValueError, OSError: one sentence that names the offender and the remedy.
    """
    torch.set_num_threads(config.threads)
    sources = read_sources(config, ranks, observer)
    params = warm_model(sources, observer, train=train_warmup, before_training=partial(refuse_early, sources))
    observer.on_stage("measuring one local step and the value of experts on public text")
    return found_world(sources, params)


def read_sources(config: Config, ranks: Ranks, observer: Observer) -> Sources:
    """Read the data and load the live model, untrained."""
    observer.on_stage(f"reading {config.data}")
    form = algorithm_class(config.algorithm)
    refuse_rounds_only(config, form)
    refuse_unfit(config, sums_alone=form.sums_alone)
    refuse_hidden(config, sees_conflict=form.sees_conflict)
    data = read_data(config, ranks, validation=form.needs_validation)
    if is_dense(config.model):
        observer.on_stage(f"splitting {config.model} into {config.split.experts} experts a layer, once")
    if not ranks.leads:  # the others find the split in the cache
        ranks.wait()
    adapter = load_model(config, data, ranks.device)
    if ranks.leads:
        ranks.wait()
    return Sources(config, form, data, adapter, Identity.of(config, corpus_sha256=data.corpus_sha256), ranks)


def refuse_early(sources: Sources, untrained: dict[str, Tensor]) -> None:
    """Plan for every client on the untrained model: a budget that cannot be served is refused before a warm-up.

    Raises:
        ValueError: as the algorithm's ``plan``.
    """
    config, form = sources.config, sources.form
    if form.lora(config) is not None or form.graft(config) is not None:  # the form is for good; take it elsewhere
        sources = replace(sources, adapter=load_model(config, sources.data, sources.ranks.device))
    world = found_world(sources, untrained)
    world.algorithm.plan(world.algorithm.init(world.params), range(config.clients))


def found_world(sources: Sources, params: dict[str, Tensor]) -> MoEWorld:
    """Measure what the model costs, give it the algorithm's form, and hand the algorithm its population."""
    config, data, adapter = sources.config, sources.data, sources.adapter
    shares = any("%" in tier for tier in config.budgets)  # of what the model in its plain form would cost
    plain = dry_step(sources, params, config.train) if shares else None
    budgets = deal_budgets(config, adapter.spec, plain)
    params = take_form(config, sources.form, adapter, params)
    population = keep_deadline(measure_population(sources, params, budgets, plain), sources.form, params)
    cohorts = meter_of(sources, params, population)
    algorithm = sources.form(population)
    return MoEWorld(config, data, adapter, params, population, algorithm, sources.ranks, sources.identity, cohorts)


def meter_of(sources: Sources, params: dict[str, Tensor], population: Population) -> CohortMeter | None:
    """Return the cost model of cohorts; None where clients train one by one: asked so, or their trunk trains."""
    config, adapter = sources.config, sources.adapter
    train = local_settings(config, sources.form)
    if config.cohort.clients == 1 or train.trunk == "fedavg" or not hasattr(adapter, "become_cohort"):
        return None
    first = next(iter(local_public_batches(config, sources.data, 1))).to(sources.ranks.device)
    padding, costs = may_pad(config, sources.data), population.costs_at
    return CohortMeter.of(cast(CohortAdapter, adapter), params, train, first, costs=costs, padding=padding)


def dry_step(
    sources: Sources, params: dict[str, Tensor], train: TrainConfig, *, lora: LoraSpec | None = None
) -> CostModel:
    """Calibrate the cost model of the model with these adapters, with the first public batch in the clients' shape."""
    config, data = sources.config, sources.data
    first = next(iter(local_public_batches(config, data, 1))).to(sources.ranks.device)
    return calibrate(
        sources.adapter,
        params,
        train,
        first,
        padding=may_pad(config, data),
        lora_rank=None if lora is None else lora.rank,
        frozen_format=None if lora is None else lora.frozen_format,
    )


def measure_population(
    sources: Sources, params: dict[str, Tensor], budgets: tuple[Budget, ...], plain: CostModel | None
) -> Population:
    """Return the fixed facts of the run: budgets, what the model in its form costs, and what the server can know."""
    config, form, data = sources.config, sources.form, sources.data
    lora, train = form.lora(config), local_settings(config, form)
    own_form = lora is not None or form.graft(config) is not None or train != config.train
    if plain is not None and not own_form:
        # One dry step of one shape: a second may find a few bytes more, and a tier would hold an expert less.
        whole = plain
    else:
        whole = dry_step(sources, params, train, lora=lora if lora is not None and lora.in_state else None)
    of_lora = whole
    if lora is not None and not lora.in_state:
        of_lora = dry_step(sources, params, train, lora=lora)
    return Population(
        config=config,
        spec=sources.adapter.spec,
        budgets=budgets,
        costs=whole,
        samples_C=np.array([client.samples for client in data.clients]),
        counts_CD=data.counts_CD,
        validation_tokens_C=validation_tokens(config, data) if form.needs_validation else None,
        lora_costs=None if lora is None else of_lora,
        prior=measure_profile(sources.adapter, params, local_public_batches(config, data, PRIOR_STEPS)),
    )


def deal_budgets(config: Config, spec: ModelSpec, plain: CostModel | None) -> tuple[Budget, ...]:
    """Deal the configured tiers to the clients in turn; return each client's budget.

    Args:
        config: with the tiers.
        spec: sizes of the model in its plain form, without grafts.
        plain: the cost model of that form; None where no tier is a percentage of bytes.
    """

    def cost_of(count: int) -> Cost:
        assert plain is not None
        # Experts side by side in all layers; what is over goes to the first ones.
        rank_LE = np.arange(spec.num_experts) * spec.num_layers + np.arange(spec.num_layers)[:, None]
        return plain.predict(rank_LE < count, rank_LE < count, local_steps=config.train.local_steps)

    total = spec.num_layers * spec.num_experts
    tiers = [
        Budget.parse(tier, spec_experts=total, plain=None if plain is None else cost_of) for tier in config.budgets
    ]
    return tuple(tiers[client % len(tiers)] for client in range(config.clients))


def take_form(
    config: Config, form: type[Algorithm], adapter: ModelAdapter, params: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Give the live model the form that the algorithm declares; return the state in it, ``params`` stays unchanged."""
    lora, graft = form.lora(config), form.graft(config)
    if lora is not None and graft is not None:
        raise ValueError(f"algorithm {config.algorithm!r} declares both adapters and grafts; declare one of them")
    if lora is None and graft is None:
        return params
    adapter.configure(params)
    if graft is not None:
        return adapter.graft(graft, seed=counter_seed(config.seed, "graft"))
    assert lora is not None
    return {**params, **adapter.add_lora(lora, seed=counter_seed(config.seed, "adapters"))}


def may_pad(config: Config, data: FederatedData) -> bool:
    """Tell whether a client's batches may hold padding: rows differ in length, and short streams fill no window."""
    streams = [part for client in data.clients for part in (client.private, client.validation) if part is not None]
    shortest = min(len(stream.tokens_N) for stream in streams)
    return data.task == "classification" or shortest < config.train.seq_len


def validation_tokens(config: Config, data: FederatedData) -> np.ndarray:
    """Count the tokens, padding included, of each client's validation pass, (C,)."""
    passes = [validation_batches(client, config) for client in data.clients]
    return np.array([sum(batch.tokens_SN.numel() for batch in batches) for batches in passes])


def read_data(config: Config, ranks: Ranks, *, validation: bool) -> FederatedData:
    """Read the corpus, split and encoded; rank 0 first, so that the others find the cache filled."""
    if not ranks.leads:
        ranks.wait()
    data = load_data(
        config.data,
        clients=config.clients,
        partition=config.partition,
        seed=config.seed,
        tokenizer=config.tokenizer,
        vocab_size=config.model_config.vocab_size,
        labels_per_class=config.warmup.labels_per_class,
        validation=validation,
        pretrained=tokenizer_of(config),
        cache=cache_directory(config),
    )
    if ranks.leads:
        ranks.wait()
    return data


def tokenizer_of(config: Config) -> TextTokenizer | None:
    """Read the tokenizer that a saved model brings; None for the small model, whose is trained on public text."""
    if config.model == "tiny":
        return None
    if is_dense(config.model):
        folder = find_splitter(config.adapter).folder(config.model, cache_directory(config))
        return pretrained_tokenizer(str(folder))
    return pretrained_tokenizer(config.model)


def load_model(config: Config, data: FederatedData, device: torch.device) -> ModelAdapter:
    """Load the live model for this task, by the adapter that the configuration names; a dense one is split first."""
    size, classes = data.tokenizer.vocab_size, data.num_classes
    if is_dense(config.model):
        place = split_of(config, data.public, public_sha256=data.public_sha256, cache=cache_directory(config))
        config = replace(config, model=str(place))
    return load_model_of(config, data.task, vocab_size=size, num_classes=classes, device=device)


def load_model_of(
    config: Config, task: str, *, vocab_size: int, num_classes: int, device: torch.device
) -> ModelAdapter:
    """Load the live model of a task with so many token ids and classes.

    Raises:
        ValueError: the model is dense, and there is no public text here to split it by; or as the adapter's loader.
    """
    if is_dense(config.model):
        raise ValueError(
            f"model={config.model} is split on public text, which a device does not have; split it once with "
            "`fedmoe split` and give model=DIR to server and devices"
        )
    load = cast("type", find_adapter(config.adapter))
    options = {} if config.train.absent == "auto" else {"absent": config.train.absent}
    adapter = load(
        config.model,
        task=task,
        model_config=config.model_config,
        vocab_size=vocab_size,
        num_classes=num_classes,
        seed=config.seed,
        **options,
    )
    adapter.model.to(device)
    return cast(ModelAdapter, adapter)


def warm_model(
    sources: Sources, observer: Observer, *, train: bool, before_training: Callable[[dict[str, Tensor]], None]
) -> dict[str, Tensor]:
    """Make the model that federation starts from; a pretrained one only trains its fresh classification head.

    Where the cache does not hold it, ``before_training`` sees the untrained weights first and may raise; it may leave
    the live model configured in any way.
    """
    config, data, adapter, ranks = sources.config, sources.data, sources.adapter, sources.ranks
    if config.model != "tiny":
        config = replace(config, warmup=replace(config.warmup, steps=0))
    if config.warmup.steps == 0 and (data.task == "causal_lm" or config.warmup.head_steps == 0):
        return adapter.state()
    key = warmup_key(
        public=data.public_sha256,
        model=sources.identity.model_sha256,
        adapter=config.adapter,
        sizes=asdict(config.model_config),
        settings=asdict(config.warmup) | {"token_dropout": config.train.token_dropout},
        task=data.task,
        classes=data.num_classes,
        seed=config.seed,
        threads=config.threads,
        device=ranks.device.type,
    )
    directory = cache_directory(config)
    if not train and not (directory / f"warmup-{key}").exists():
        return adapter.state()
    labels = 0 if data.public_labeled is None else len(data.public_labeled)

    def warmed() -> dict[str, Tensor]:
        untrained = adapter.state()
        before_training(untrained)
        adapter.configure(untrained)
        return warm_up(adapter, data, config, observer.on_progress)

    observer.on_stage(
        f"warm-up on {len(data.public.tokens_N):,} public tokens"
        + (f", of which {labels} rows are labelled ({config.warmup.labels_per_class} a class)" if labels else "")
    )
    if not ranks.leads:
        ranks.wait()
    forms = {param.key: (tuple(param.shape), param.dtype) for param in adapter.spec.params}
    params, _ = cached_warmup(directory, key, warmed, forms)
    if ranks.leads:
        ranks.wait()
    return {key: tensor.to(ranks.device) for key, tensor in params.items()}


def local_public_batches(config: Config, data: FederatedData, steps: int) -> Iterable[Batch]:
    """Draw public batches of the clients' shape, for measuring; labels are those given (none is invented)."""
    source = data.public if data.public_labeled is None else data.public_labeled
    return islice(
        public_batches(
            source,
            seed=config.seed,
            steps=steps,
            batch_size=config.train.batch_size,
            seq_len=config.train.seq_len,
            purpose="measure",
        ),
        steps,
    )
