"""The sections of a configuration: frozen dataclasses, and every field has a type, a bound, a default and a meaning.

The comment on a field is its meaning in the documentation; ``docs/generate.py`` reads it from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta

from fedmoe_core.config.schema import one_of

Positive = Annotated[int, Meta(ge=1)]
Natural = Annotated[int, Meta(ge=0)]
PositiveReal = Annotated[float, Meta(gt=0.0)]
NaturalReal = Annotated[float, Meta(ge=0.0)]
Share = Annotated[float, Meta(ge=0.0, le=1.0)]


@dataclass(frozen=True)
class ModelConfig:
    """Size of the default small model; ignored when ``Config.model`` is a path or a hub id."""

    hidden_size: Positive = 128  # width of a token's vector between layers
    layers: Positive = 2  # transformer layers, each with one MoE layer
    heads: Positive = 4  # attention heads; a multiple of kv_heads
    kv_heads: Positive = 2  # key and value heads, which groups of attention heads share
    head_dim: Annotated[int, Meta(ge=2, multiple_of=2)] = 32  # width of one attention head; rotary positions pair it up
    experts: Positive = 16  # experts of each MoE layer
    top_k: Positive = 2  # experts that each token is sent to
    expert_width: Positive = 64  # width of the layer inside an expert
    vocab_size: Annotated[int, Meta(ge=257)] = 2048  # token ids; 256 bytes and one special token at least


@dataclass(frozen=True)
class SplitConfig:
    """How a dense model becomes a Mixture of Experts; read where ``Config.model`` is smollm2 or dense:DIR."""

    experts: Annotated[int, Meta(ge=2)] = 16  # experts of each split layer; they must divide the width of its MLP
    top_k: Positive = 4  # experts that each token is sent to
    # which layers are split; the others stay dense, and below the first split one nothing trains
    layers: Annotated[str, one_of("all", "last:N")] = "last:4"
    tokens: Annotated[int, Meta(ge=256)] = 8192  # tokens of public text that the routers are fitted on


@dataclass(frozen=True)
class WarmupConfig:
    """Central training on the public split, which stands in for pretraining; cached on disk."""

    steps: Natural = 500  # optimizer steps on public text; 0 = start from fresh weights
    batch_size: Positive = 16  # sequences of a step
    seq_len: Annotated[int, Meta(ge=2)] = 128  # tokens of a sequence
    lr: PositiveReal = 3e-3  # learning rate of AdamW
    weight_decay: NaturalReal = 0.1  # weight decay of AdamW
    balance: NaturalReal = 0.001  # weight of the Switch load-balance loss, which spreads tokens over experts
    labels_per_class: Positive = 25  # classification only: labelled public rows that the head may see
    head_steps: Natural = 60  # classification only: steps on those rows, after the steps on public text
    head_lr: PositiveReal = 1e-3  # classification only: learning rate of those steps


@dataclass(frozen=True)
class TrainConfig:
    """Local training of every client; the optimizer is AdamW with fresh state each round."""

    batch_size: Positive = 4  # sequences of a local step
    seq_len: Annotated[int, Meta(ge=2)] = 128  # tokens of a sequence
    local_steps: Positive = 8  # optimizer steps of a client in a round; a FLOP budget may lower them
    local_epochs: Natural = 0  # plain torch models only: passes over a client's rows, instead of local_steps; 0 = off
    lr: PositiveReal = 2e-3  # learning rate in the first round
    lr_final: Share = 1.0  # share of lr left in the last round; the rate falls between them along a cosine
    weight_decay: NaturalReal = 0.0  # weight decay of AdamW; frozen experts feel none of it
    # real seconds after which a client counts as failed, of a cohort for each, on real devices of a round; 0 = never
    timeout: NaturalReal = 0.0
    clip: NaturalReal = 1.0  # largest L2 norm of a step's gradient; a larger one is scaled down; 0 = never
    prox: NaturalReal = 0.0  # mu of FedProx (arXiv 1812.06127): mu/2 ||w - w0||^2 over what trains, w0 as received
    label_smoothing: Annotated[float, Meta(ge=0.0, le=0.99)] = 0.0  # share of the target that all classes have alike
    # frozen: only experts and routers learn; fedavg: everything else learns too, averaged by FedAvg
    trunk: Literal["frozen", "fedavg"] = "frozen"
    # weight of a choice that a client lacks; renormalize: the experts it holds get it; share: it is missing, as in
    # models whose experts' outputs add up; auto: share for a model that was split, else renormalize
    absent: Literal["auto", "renormalize", "share"] = "auto"
    # what learns of an expert; whole: all of its weights; lora: adapters of lora.rank, averaged as experts would be
    experts: Literal["whole", "lora"] = "whole"
    # classification only: chance that a token is hidden in training
    token_dropout: Annotated[float, Meta(ge=0.0, le=0.95)] = 0.0
    logit_adjustment: NaturalReal = 0.0  # classification only: weight of the client's log class shares in its loss


@dataclass(frozen=True)
class CohortConfig:
    """Several clients trained at once over one frozen trunk: faster, and equal up to rounding."""

    clients: Natural = 1  # most that train at once; 1: one after another, each peak measured; 0: all that memory holds
    memory: str = "auto"  # most memory of those that train at once, such as 4GiB; auto: 2GiB, of a GPU 80 %


@dataclass(frozen=True)
class TimeConfig:
    """A virtual clock by the speeds that the budgets state, and what it decides; a model, not a measurement."""

    # rounds: the server waits for all clients of a round; buffered: it applies the first `buffer` answers that arrive,
    # while the other clients train on (FedBuff, arXiv 2106.06639)
    mode: Literal["rounds", "buffered"] = "rounds"
    buffer: Natural = 0  # buffered only: answers that make one server step; clients_per_round are in flight
    # buffered only: a in (1 + tau)^-a, which scales a change that was trained tau server steps ago; 0 = not at all
    staleness: Annotated[float, Meta(ge=0.0, le=10.0)] = 0.5
    # sigma of the log-normal factor, of median 1, by which a client's time in a round strays; 0 = none
    straggle: Annotated[float, Meta(ge=0.0, le=10.0)] = 0.0
    deadline: NaturalReal = 0.0  # virtual seconds after which a round takes no update; 0 = none
    # shorten: plans fit the deadline, by fewer local steps; drop: plans do not know it. An update after it never counts
    late: Literal["shorten", "drop"] = "shorten"
    target: NaturalReal = 0.0  # held-out loss, or accuracy of labelled data, whose virtual time is told; 0 = none


@dataclass(frozen=True)
class SelectionConfig:
    """How experts are scored and chosen under a budget (HFedMoE eqs. 3-5, 10-15)."""

    # what an expert is worth: s = eq. 5, ib = eq. 14, taylor = |weight x gradient| of the backward pass; reap = mean
    # over its tokens of router weight x norm of its output, reap_sum = their sum
    score: Literal["s", "ib", "taylor", "reap", "reap_sum"] = "ib"
    # compact: store only chosen experts; backward-masked: store all, train only the chosen
    mode: Literal["compact", "backward-masked"] = "compact"
    reschedule: Literal["round", "batch"] = "round"  # when eq. 15 is solved; per batch only backward-masked
    lam: Share = 0.5  # lambda of eq. 5: weight of the mean gate value; the largest has the rest
    lam_change: float = 0.0  # what the last round adds to lam, in equal steps; beta and tau likewise
    beta: NaturalReal = 0.1  # beta of eq. 14: weight of the information that a router spends on an expert
    beta_change: float = 0.0  # what the last round adds to beta
    explore: Share = 0.1  # chance per client and layer that one held expert gives way to an absent one


@dataclass(frozen=True)
class AggregationConfig:
    """How updates are averaged (HFedMoE eqs. 16-21)."""

    # participation: mean over the clients that trained an expert (eq. 17); damped: over all clients of the round
    experts: Literal["participation", "damped"] = "participation"
    # how routers are averaged (eqs. 18-21); auto: by selection.mode
    gate: Literal["auto", "row-wise", "normalized", "literal", "fedavg"] = "auto"
    tau: Share = 0.0  # usage threshold of eq. 17: a client that uses an expert less does not vote on it
    tau_change: float = 0.0  # what the last round adds to tau
    # samples: a client counts by its number of samples; uniform: all clients count alike
    weighting: Literal["samples", "uniform"] = "samples"
    participation: bool = True  # an expert that saw no row does not vote
    value_bound: PositiveReal = 1.0  # largest |delta| accepted; larger is refused
    norm_bound: PositiveReal = 100.0  # largest L2 norm of an update accepted
    scale_bits: Annotated[int, Meta(ge=8, le=52)] = 36  # binary places kept in the exact sums
    weight_bits: Annotated[int, Meta(ge=1, le=30)] = 16  # bits of a client's weight in the exact sums


@dataclass(frozen=True)
class GuardConfig:
    """What bounds the harm of hostile clients beyond the checks of each update.

    Each part of the model is judged alone: an expert, a router row, all dense tensors.
    """

    quorum: Positive = 1  # fewest clients that change a part; with fewer it keeps its bits
    # none: all count as they are; the others first scale down changes of unusual norm. norm: then sum; trimmed_mean,
    # median: of each number over the clients; krum: sum those whose changes lie closest to others'
    rule: Literal["none", "norm", "trimmed_mean", "median", "krum"] = "none"
    # share of a part's clients that may be hostile: so many are trimmed at either end, or left out by krum
    hostile: Annotated[float, Meta(gt=0.0, le=0.49)] = 0.2
    # a part with too few clients for the rule (3; krum 5); bounded: sums what the norm bound leaves; keep: unchanged
    few: Literal["bounded", "keep"] = "bounded"
    factor: Annotated[float, Meta(ge=1.0)] = 3.0  # norm bound, in running medians of the norms in the layer


@dataclass(frozen=True)
class FedMoEConfig:
    """FedMoE's settings (arXiv 2408.11304); the paper gives a value for ``tunings`` alone, about 5."""

    fill: Annotated[float, Meta(ge=0.01, le=1.0)] = 0.9  # a of eq. 3: share of a budget that stage one may use
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
    """Ingredients of HFedMoE+ (``algorithm = "hfedmoe_plus"``), which there replace [selection] and [aggregation].

    Each can be switched off alone: importance=ib, hold_share=0, gate=row-wise and explore=0.1 are HFedMoE's own.
    """

    # what an expert is worth, as selection.score; hits: how often the client's own tokens choose it
    importance: Literal["taylor", "s", "ib", "reap", "reap_sum", "hits"] = "taylor"
    mean: Literal["participation", "damped"] = "participation"  # as aggregation.experts
    # personal: each client keeps its own router; frozen: routers neither train nor travel
    gate: Literal["personal", "row-wise", "frozen", "normalized"] = "personal"
    explore: Share = 0.0  # as selection.explore; measured to cost a little on two corpora
    # of what a client could train, the share that it trains; what that saves buys frozen experts
    train_share: Annotated[float, Meta(ge=0.01, le=1.0)] = 0.5
    hold_share: Share = 0.5  # share of all experts; frozen ones are bought until so many are held


@dataclass(frozen=True)
class FftMoEConfig:
    """FFT-MoE's settings (arXiv 2508.18663), none of which is known from the paper."""

    experts: Positive = 4  # M, experts of each grafted mixture
    width: Positive = 16  # r, bottleneck of an expert
    top_k: Positive = 2  # k_max: most experts that a token is sent to
    balance: NaturalReal = 0.01  # lambda0: weight of the balance loss on a client of even data that runs k_max
    pull: NaturalReal = 0.01  # mu: weight of the divergence from the client's own target distribution
    smoothing: Share = 0.5  # weight of the newest routing distribution in a client's running one
    aggregation: Literal["fedavg", "usage"] = "fedavg"  # usage: FLAME's weights, by how often an expert was activated


@dataclass(frozen=True)
class LoraConfig:
    """Adapters on the experts: of FLAME, HetLoRA, FlexLoRA, FedMoE's stage one, and wherever ``train.experts=lora``."""

    rank: Positive = 8  # rank of the factors of a client without limits
    alpha: PositiveReal = 16.0  # the product counts alpha / rank, for clients of every rank
    # bits that clients store and receive the experts in under adapters that are aggregated; none: as the model has them
    frozen_format: Literal["none", "int8", "int4", "fp8_e4m3", "mxfp4", "nvfp4", "nf4"] = "none"
    temperature: NaturalReal = 2.0  # t of FLAME's activation weights; 0 is FedAvg
    keep_share: Annotated[float, Meta(ge=0.01, le=1.0)] = 0.99  # HetLoRA's gamma: share of the ranks that pruning keeps
    tail: NaturalReal = 0.005  # HetLoRA's weight of the tail-rank regulariser


@dataclass(frozen=True)
class FluxConfig:
    """Flux's settings (arXiv 2508.19078); the values are ours."""

    tune_share: Share = 0.5  # share of the experts a client could train that it tunes; the rest are merged slots
    epsilon_start: Share = 0.3  # share of the tuned that are trained in the first round; the others are explored
    epsilon_step: NaturalReal = 0.1  # growth of that share in a round
    epsilon_most: Share = 0.9  # largest value of that share
    probes: Positive = 4  # pairs of forward passes for each explored expert
    sigma: PositiveReal = 1e-3  # size of the change of weights that they try


@dataclass(frozen=True)
class FcMoEConfig:
    """FC-MoE's setting (arXiv 2606.15625); its value is the paper's, by a digest."""

    retention: Share = 0.5  # lambda: share of what was projected out of a client's change that it starts its next with


@dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation on every client's test split."""

    sequences: Positive = 8  # held-out sequences or rows of each client that are evaluated
    every: Positive = 1  # evaluate after every so many rounds, and after the last
    personal: bool = False  # also every client's own deployable model, on its own test split
    validation: Positive = 64  # most rows or windows of one client's validation pass, where its algorithm has one


@dataclass(frozen=True)
class PrivacyConfig:
    """Differential privacy of the model, client by client, and sums that the server sees as a whole; off by default."""

    # largest L2 norm of all that a client adds to the sums of a round; more is scaled down; 0 = not private
    clip: NaturalReal = 0.0
    noise: NaturalReal = 0.0  # z: each number of the sums gets Gaussian noise of sigma z * clip; 0 = none
    delta: Share = 0.0  # delta of (epsilon, delta), below 1 / clients; noise needs it
    epsilon: NaturalReal = 0.0  # the run ends before the round that would pass it; 0 = no limit
    # who takes part and the noise follow from 32 bytes of the operating system instead of the seed; always so on real
    # devices
    secret: bool = False
    secure: bool = False  # clients mask what they send, so that the server sees the sums of a round alone
    # secure only: share of the clients of a round that must stay to its end, or it changes nothing
    threshold: Annotated[float, Meta(gt=0.5, le=1.0)] = 0.67
    drop: Share = 0.0  # chance that a client drops out of a round, at one of the five steps of secure aggregation


@dataclass(frozen=True)
class WatchConfig:
    """Where a run's curves go besides the screen; nothing here decides a result."""

    sinks: str = ""  # names with commas between them: tensorboard, wandb, mlflow, prometheus or your own; empty = none
    prometheus: str = ""  # file that the prometheus sink replaces each round; empty = metrics.prom in out
