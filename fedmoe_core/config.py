"""One run's configuration: frozen dataclasses, read from TOML and key=value overrides."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class ModelConfig:
    """Size of the default small model; ignored when ``Config.model`` is a path or a hub id."""

    hidden_size: int = 128
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    experts: int = 16
    top_k: int = 2
    expert_width: int = 64
    vocab_size: int = 2048


@dataclass(frozen=True)
class WarmupConfig:
    """Central training on the public split, which stands in for pretraining; cached on disk."""

    steps: int = 500
    batch_size: int = 16
    seq_len: int = 128
    lr: float = 3e-3
    weight_decay: float = 0.1
    balance: float = 0.001  # weight of the Switch load-balance loss
    labels_per_class: int = 25  # classification only: labelled public rows that the head may see
    head_steps: int = 60  # classification only


@dataclass(frozen=True)
class TrainConfig:
    """Local training of every client; the optimizer is AdamW with fresh state each round."""

    batch_size: int = 4
    seq_len: int = 128
    local_steps: int = 8
    lr: float = 2e-3
    weight_decay: float = 0.0
    clip: float = 1.0
    trunk: Literal["frozen", "fedavg"] = "frozen"
    token_dropout: float = 0.0  # classification only


@dataclass(frozen=True)
class SelectionConfig:
    """How experts are scored and chosen under a budget (HFedMoE eqs. 3-5, 10-15)."""

    score: Literal["s", "ib", "taylor"] = "ib"
    mode: Literal["compact", "backward-masked"] = "compact"
    lam: float = 0.5  # lambda of eq. 5
    beta: float = 0.1  # beta of eq. 14
    explore: float = 0.1  # chance per client and layer that one held expert gives way to an absent one


@dataclass(frozen=True)
class AggregationConfig:
    """How updates are averaged (HFedMoE eqs. 16-21)."""

    experts: Literal["participation", "damped"] = "participation"
    gate: Literal["auto", "row-wise", "normalised", "literal", "fedavg"] = "auto"  # auto: by SelectionConfig.mode
    tau: float = 0.0  # usage threshold of eq. 17
    weighting: Literal["samples", "uniform"] = "samples"
    participation: bool = True  # an expert that saw no row does not vote
    value_bound: float = 1.0  # largest |delta| accepted; larger is refused
    norm_bound: float = 100.0  # largest L2 norm of an update accepted
    scale_bits: int = 36
    weight_bits: int = 12


@dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation of the global model on every client's test split."""

    sequences: int = 8  # per client
    every: int = 1  # rounds


@dataclass(frozen=True)
class Config:
    """Everything that decides a run. Saved, resolved, as ``config.toml`` in the run directory."""

    algorithm: str = "hfedmoe"
    data: str = "stdlib"  # stdlib | csv:FILE | jsonl:FILE
    model: str = "tiny"  # tiny | path | hub id
    adapter: str = "transformers"
    clients: int = 10
    clients_per_round: int = 0  # 0 = all
    rounds: int = 8
    seed: int = 0
    partition: str = "domain"  # domain | iid | dirichlet:ALPHA
    budgets: tuple[str, ...] = ("experts=25%",)  # tiers, dealt to the clients in turn
    min_clients: int = 1
    ranks: int = 1
    threads: int = 0  # per client process; 0 = cores divided by ranks
    device: str = "auto"
    cache: str = ""  # directory of cached warm-ups; empty = the user's cache directory
    out: str = "runs/last"
    model_config: ModelConfig = field(default_factory=ModelConfig)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    aggregation: AggregationConfig = field(default_factory=AggregationConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
