"""One run's configuration: frozen dataclasses that check themselves, named by dotted keys such as ``train.lr``."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from fedmoe_core.budget import NOTHING, Budget
from fedmoe_core.names import ALGORITHMS
from fedmoe_core.schema import (
    PLACE,
    AtLeast,
    Between,
    MoreThan,
    OneOf,
    build,
    check,
    parse_override,
    read_toml,
    schema_of,
    write_toml,
)

Positive = Annotated[int, AtLeast(1)]
Natural = Annotated[int, AtLeast(0)]
PositiveReal = Annotated[float, MoreThan(0.0)]
NaturalReal = Annotated[float, AtLeast(0.0)]
Share = Annotated[float, Between(0.0, 1.0)]


@dataclass(frozen=True)
class ModelConfig:
    """Size of the default small model; ignored when ``Config.model`` is a path or a hub id."""

    hidden_size: Positive = 128
    layers: Positive = 2
    heads: Positive = 4
    kv_heads: Positive = 2
    head_dim: Annotated[int, AtLeast(2)] = 32
    experts: Positive = 16
    top_k: Positive = 2
    expert_width: Positive = 64
    vocab_size: Annotated[int, AtLeast(257)] = 2048  # 256 bytes and one special token at least


@dataclass(frozen=True)
class WarmupConfig:
    """Central training on the public split, which stands in for pretraining; cached on disk."""

    steps: Natural = 500
    batch_size: Positive = 16
    seq_len: Annotated[int, AtLeast(2)] = 128
    lr: PositiveReal = 3e-3
    weight_decay: NaturalReal = 0.1
    balance: NaturalReal = 0.001  # weight of the Switch load-balance loss
    labels_per_class: Positive = 25  # classification only: labelled public rows that the head may see
    head_steps: Natural = 60  # classification only: steps on those rows, after the steps on public text
    head_lr: PositiveReal = 1e-3  # classification only


@dataclass(frozen=True)
class TrainConfig:
    """Local training of every client; the optimizer is AdamW with fresh state each round."""

    batch_size: Positive = 4
    seq_len: Annotated[int, AtLeast(2)] = 128
    local_steps: Positive = 8
    lr: PositiveReal = 2e-3
    lr_final: Share = 1.0  # share of lr left in the last round; the rate falls between them along a cosine
    weight_decay: NaturalReal = 0.0
    clip: PositiveReal = 1.0
    prox: NaturalReal = 0.0  # mu of FedProx (arXiv 1812.06127): mu/2 ||w - w0||^2 over what trains, w0 as received
    label_smoothing: Annotated[float, Between(0.0, 0.99)] = 0.0  # share of the target that all classes have alike
    trunk: Literal["frozen", "fedavg"] = "frozen"
    token_dropout: Annotated[float, Between(0.0, 0.95)] = 0.0  # classification only
    logit_adjustment: NaturalReal = 0.0  # classification only: weight of the client's log class shares in its loss


@dataclass(frozen=True)
class SelectionConfig:
    """How experts are scored and chosen under a budget (HFedMoE eqs. 3-5, 10-15)."""

    score: Literal["s", "ib", "taylor"] = "ib"
    mode: Literal["compact", "backward-masked"] = "compact"
    reschedule: Literal["round", "batch"] = "round"  # when eq. 15 is solved; per batch only backward-masked
    lam: Share = 0.5  # lambda of eq. 5
    lam_change: float = 0.0  # what the last round adds to lam, in equal steps; beta and tau likewise
    beta: NaturalReal = 0.1  # beta of eq. 14
    beta_change: float = 0.0
    explore: Share = 0.1  # chance per client and layer that one held expert gives way to an absent one


@dataclass(frozen=True)
class AggregationConfig:
    """How updates are averaged (HFedMoE eqs. 16-21)."""

    experts: Literal["participation", "damped"] = "participation"
    gate: Literal["auto", "row-wise", "normalised", "literal", "fedavg"] = "auto"  # auto: by SelectionConfig.mode
    tau: Share = 0.0  # usage threshold of eq. 17
    tau_change: float = 0.0
    weighting: Literal["samples", "uniform"] = "samples"
    participation: bool = True  # an expert that saw no row does not vote
    value_bound: PositiveReal = 1.0  # largest |delta| accepted; larger is refused
    norm_bound: PositiveReal = 100.0  # largest L2 norm of an update accepted
    scale_bits: Annotated[int, Between(8, 52)] = 36
    weight_bits: int = 16


@dataclass(frozen=True)
class FedMoEConfig:
    """FedMoE's settings (arXiv 2408.11304); the paper gives a value for ``tunings`` alone, about 5."""

    fill: Annotated[float, Between(0.01, 1.0)] = 0.9  # a of eq. 3: share of a budget that stage one may use
    tunings: Natural = 5  # stage one: passes over a round's batches that fit adapters before the model is profiled
    balance: NaturalReal = 0.01  # alpha of eq. 1: weight of the load-balance loss
    similar: Positive = 5  # K of eq. 5: how many similar clients advise
    patience: Positive = 3  # participations without improvement before a sub-model changes, or is reverted
    smoothing: Share = 0.5  # weight of the newest profile in a client's running one


@dataclass(frozen=True)
class FlexMoEConfig:
    """FLEX-MoE's settings (arXiv 2512.23070); the values are ours."""

    exploration: NaturalReal = 0.2  # xi: what a pair never tried is worth in fitness, times sqrt(log t)
    rate: Share = 0.5  # g: weight of the newest quality in a pair's moving average
    deficit_weight: NaturalReal = 1.0  # eta: what being owed one mean load is worth, in z-scores of fitness
    delta: Share = 0.1  # how far a load may be from the mean
    slack_price: PositiveReal = 3.0  # M: what one mean client of load outside those bounds costs, in z-scores
    feedback: Natural = 2  # local batches over which a client measures loss and accuracy by expert


@dataclass(frozen=True)
class PlusConfig:
    """Ingredients of HFedMoE+ (``algorithm = "hfedmoe_plus"``), which come before [selection] and [aggregation] there.

    Each can be switched off alone: importance=ib, hold_share=0, gate=row-wise and explore=0.1 are HFedMoE's own.
    """

    importance: Literal["taylor", "s", "ib", "hits"] = "taylor"  # hits: how often the client's own tokens choose it
    mean: Literal["participation", "damped"] = "participation"
    gate: Literal["personal", "row-wise", "frozen", "normalised"] = "personal"  # frozen: neither trains nor travels
    explore: Share = 0.0  # as selection.explore; measured to cost a little on two corpora
    train_share: Annotated[float, Between(0.01, 1.0)] = 0.5  # of what a client could train; the rest buys frozen ones
    hold_share: Share = 0.5  # of all experts; frozen ones are bought until so many are held
    redundancy: NaturalReal = (
        0.0  # rho: how much two experts that say the same are worth less; measured to gain nothing
    )


@dataclass(frozen=True)
class FftMoEConfig:
    """FFT-MoE's settings (arXiv 2508.18663), none of which is known from the paper."""

    experts: Positive = 4  # M, experts of each grafted mixture
    width: Positive = 16  # r, bottleneck of an expert
    top_k: Positive = 2  # k_max
    balance: NaturalReal = 0.01  # lambda0: weight of the balance loss on a client of even data that runs k_max
    pull: NaturalReal = 0.01  # mu: weight of the divergence from the client's own target distribution
    smoothing: Share = 0.5  # weight of the newest routing distribution in a client's running one
    aggregation: Literal["fedavg", "usage"] = "fedavg"  # usage: FLAME's weights, by how often an expert was activated


@dataclass(frozen=True)
class LoraConfig:
    """Adapters on the experts: FLAME, HetLoRA, FlexLoRA, FedMoE's stage one, and FLAME's weights wherever used."""

    rank: Positive = 8  # of a client without limits
    alpha: PositiveReal = 16.0  # the product counts alpha / rank, for clients of every rank
    temperature: NaturalReal = 2.0  # t of FLAME's activation weights; 0 is FedAvg
    keep_share: Annotated[float, Between(0.01, 1.0)] = 0.99  # HetLoRA's gamma: share of the ranks that pruning keeps
    tail: NaturalReal = 0.005  # HetLoRA's weight of the tail-rank regulariser


@dataclass(frozen=True)
class FluxConfig:
    """Flux's settings (arXiv 2508.19078); the values are ours."""

    tune_share: Share = 0.5  # share of the experts a client could train that it tunes; the rest are merged slots
    epsilon_start: Share = 0.3  # share of the tuned that are trained in the first round; the others are explored
    epsilon_step: NaturalReal = 0.1  # growth of that share in a round
    epsilon_most: Share = 0.9
    probes: Positive = 4  # pairs of forward passes for each explored expert
    sigma: PositiveReal = 1e-3  # size of the change of weights that they try


@dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation on every client's test split."""

    sequences: Positive = 8  # per client
    every: Positive = 1  # rounds
    personal: bool = False  # also every client's own deployable model, on its own test split
    validation: Positive = 64  # most rows or windows of one client's validation pass, where its algorithm has one


@dataclass(frozen=True)
class Config:
    """Everything that decides a run. Saved, resolved, as ``config.toml`` in the run directory.

    Raises:
        ValueError: a value of the wrong type, out of range, or at odds with another; one sentence with the remedy.
    """

    algorithm: Annotated[str, OneOf(*ALGORITHMS, PLACE)] = "hfedmoe"
    data: Annotated[str, OneOf("stdlib", "csv:FILE", "jsonl:FILE")] = "stdlib"
    tokenizer: Annotated[str, OneOf("auto", "bpe", "bpe-lower", "word")] = "auto"
    model: str = "tiny"  # tiny | path | hub id
    adapter: str = "transformers"
    clients: Positive = 10
    clients_per_round: Natural = 0  # 0 = all
    rounds: Positive = 8
    seed: Annotated[int, Between(0, 2**63 - 1)] = 0
    partition: Annotated[str, OneOf("auto", "domain", "iid", "dirichlet:ALPHA")] = "auto"
    budgets: tuple[str, ...] = ("experts=12.5%", "experts=25%", "experts=50%", "experts=100%")  # dealt in turn
    min_clients: Positive = 1
    ranks: Positive = 1
    threads: Natural = 0  # per client process; 0 = cores divided by ranks
    device: Annotated[str, OneOf("auto", "cpu", "cuda", "cuda:INDEX")] = "auto"
    cache: str = ""  # directory of cached warm-ups; empty = the user's cache directory
    out: str = "runs/last"
    model_config: ModelConfig = field(default_factory=ModelConfig)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    aggregation: AggregationConfig = field(default_factory=AggregationConfig)
    fedmoe: FedMoEConfig = field(default_factory=FedMoEConfig)
    flex_moe: FlexMoEConfig = field(default_factory=FlexMoEConfig)
    plus: PlusConfig = field(default_factory=PlusConfig)
    fft_moe: FftMoEConfig = field(default_factory=FftMoEConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    flux: FluxConfig = field(default_factory=FluxConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        values = flatten(self)
        for key, setting in schema_of(Config).items():
            check(key, values[key], setting)
        for key in ("model", "adapter", "out"):
            if not values[key]:
                raise ValueError(f"{key} is empty; name one")
        if not self.budgets or not all(tier.strip() for tier in self.budgets):
            raise ValueError("budgets has an empty tier; give at least one, such as experts=25% or memory=30MiB")
        for tier in self.budgets:
            # Its words; what a share of experts comes to is known with the model.
            Budget.parse(tier, spec_experts=1, plain=lambda count: NOTHING)
        _check_partition(self.partition)
        _check_model(self.model_config)
        if self.fft_moe.top_k > self.fft_moe.experts:
            raise ValueError(
                f"fft_moe.top_k={self.fft_moe.top_k} exceeds fft_moe.experts={self.fft_moe.experts}; lower it"
            )
        sampled = self.clients_per_round or self.clients
        if sampled > self.clients:
            raise ValueError(f"clients_per_round={sampled} exceeds clients={self.clients}; lower it, or 0 for all")
        _check_reschedule(self.selection, self.train)
        for key, most in (("selection.lam", 1.0), ("selection.beta", math.inf), ("aggregation.tau", 1.0)):
            last = values[key] + values[f"{key}_change"]
            if not 0 <= last <= most:
                raise ValueError(f"{key} + {key}_change is {last:g} in the last round; keep it from 0 to {most:g}")
        if self.min_clients > sampled:
            raise ValueError(f"min_clients={self.min_clients} exceeds the {sampled} clients of a round; lower it")

    @staticmethod
    def load(path: Path | None = None, overrides: Sequence[str] = ()) -> Config:
        """A configuration from defaults, then the task's preset, then the TOML file, then ``key=value`` overrides.

        Raises:
            ValueError: an unknown key or value (with the nearest valid one), or a file that is not TOML.
            OSError: the file cannot be read.
        """
        schema = schema_of(Config)
        chosen = read_toml(path, schema) if path else {}
        chosen |= dict(parse_override(text, schema) for text in overrides)
        data = chosen.get("data", Config.data)
        preset = CLASSIFICATION_DEFAULTS if isinstance(data, str) and is_labelled(data) else {}
        return build(Config, {**preset, **chosen})

    def resolved(self) -> Config:
        """The same run with ``threads`` as this machine's number and absolute paths, so that it can go on anywhere."""
        kind, _, file = self.data.partition(":")
        data = f"{kind}:{Path(file).absolute()}" if file else self.data
        model = str(Path(self.model).absolute()) if Path(self.model).is_dir() and self.model != "tiny" else self.model
        threads = self.threads or max(1, usable_cores() // self.ranks)
        return replace(self, threads=threads, data=data, model=model)

    def to_toml(self) -> str:
        """Every key and value as TOML; ``Config.load`` of that text gives an equal configuration."""
        return write_toml(flatten(self), schema_of(Config))

    def decisive(self) -> dict[str, Any]:
        """Values by dotted key that decide results: all but where files lie and how many ranks share the work.

        Data and model count by kind (``csv``, ``given``) here and by content in ``identity``, never by their path.
        """
        named = {"data": self.data.partition(":")[0], "model": self.model if self.model == "tiny" else "given"}
        return {key: value for key, value in (flatten(self) | named).items() if key not in INDIFFERENT}

    def diff(self, other: Config) -> dict[str, tuple[Any, Any]]:
        """Dotted keys that decide results and differ, with this value and the other."""
        mine, theirs = self.decisive(), other.decisive()
        return {key: (mine[key], theirs[key]) for key in mine if mine[key] != theirs[key]}


# Same results whatever these say; `threads` is not here, because the order of a sum depends on it.
INDIFFERENT = frozenset({"out", "cache", "ranks"})

# What labelled data starts from, below the user's own words.
CLASSIFICATION_DEFAULTS: Mapping[str, object] = {
    "rounds": 20,
    "model_config.layers": 1,
    "model_config.vocab_size": 4096,
    "warmup.steps": 300,
    "warmup.batch_size": 32,
    "warmup.seq_len": 64,
    "train.batch_size": 16,
    "train.seq_len": 64,
    "train.local_steps": 12,
    "train.lr": 3e-3,
    "train.lr_final": 0.1,
    "train.weight_decay": 0.1,
    "train.trunk": "fedavg",  # a frozen trunk cannot learn the words that public text lacks
    "train.token_dropout": 0.3,
    "train.logit_adjustment": 1.0,
}


def usable_cores() -> int:
    """Count the cores that this process may run on."""
    allowed = getattr(os, "sched_getaffinity", None)  # absent outside Linux
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def is_labelled(data: str) -> bool:
    """Whether ``Config.data`` holds labels: every CSV does; a JSONL file does when its first object has a ``label``."""
    kind, _, name = data.partition(":")
    if kind != "jsonl":
        return kind == "csv"
    if not Path(name).is_file():
        return False  # the data room says so; a pipe would lose its first line here
    try:
        with open(name, encoding="utf-8") as lines:
            first = next((line for line in lines if line.strip()), "")
    except (OSError, UnicodeDecodeError):
        return False  # the data room names the file and the fault
    return '"label"' in first


def flatten(record: object, prefix: str = "") -> dict[str, Any]:
    """Values of a nested configuration by dotted key, in the order of the fields."""
    flat: dict[str, Any] = {}
    for item in fields(record):  # type: ignore[arg-type]
        value = getattr(record, item.name)
        if is_dataclass(value):
            flat |= flatten(value, f"{prefix}{item.name}.")
        else:
            flat[prefix + item.name] = value
    return flat


def _check_reschedule(selection: SelectionConfig, train: TrainConfig) -> None:
    if selection.reschedule == "round":
        return
    if selection.mode != "backward-masked":
        raise ValueError("selection.reschedule=batch needs every expert resident; set selection.mode=backward-masked")
    if selection.score == "taylor":
        raise ValueError("selection.score=taylor needs a backward pass, which no scoring pass has; choose s or ib")
    if train.prox > 0:
        raise ValueError("train.prox holds experts of a whole round; set selection.reschedule=round with it")


def _check_partition(partition: str) -> None:
    kind, _, text = partition.partition(":")
    if kind != "dirichlet":
        return
    try:
        alpha = float(text)
    except ValueError:
        alpha = math.nan
    if not (0 < alpha < math.inf):
        raise ValueError(f"partition={partition!r} needs a number greater than 0, such as dirichlet:0.5")


def _check_model(model: ModelConfig) -> None:
    if model.top_k > model.experts:
        raise ValueError(
            f"model_config.top_k={model.top_k} exceeds model_config.experts={model.experts}; "
            f"choose top_k <= {model.experts}"
        )
    if model.heads % model.kv_heads:
        raise ValueError(
            f"model_config.heads={model.heads} is not a multiple of model_config.kv_heads={model.kv_heads}; "
            "choose kv_heads that divides heads"
        )
    if model.head_dim % 2:
        raise ValueError(f"model_config.head_dim={model.head_dim} is odd; rotary positions need an even number")
