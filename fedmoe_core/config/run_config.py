"""One run's configuration: frozen dataclasses that check themselves, named by dotted keys such as ``train.lr``."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, is_dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from msgspec import Meta

from fedmoe_core.base.wording import differing
from fedmoe_core.budget.limits import NOTHING, Budget
from fedmoe_core.config.pairs import OWN, check_pairs, is_plain
from fedmoe_core.config.schema import (
    Setting,
    build,
    by_key,
    checked,
    one_of,
    parse_override,
    read_toml,
    schema_of,
    write_toml,
)
from fedmoe_core.config.sections import (
    AggregationConfig,
    CohortConfig,
    EvalConfig,
    FcMoEConfig,
    FedMoEConfig,
    FftMoEConfig,
    FlexMoEConfig,
    FluxConfig,
    GuardConfig,
    LoraConfig,
    ModelConfig,
    Natural,
    PlusConfig,
    Positive,
    PrivacyConfig,
    SelectionConfig,
    SplitConfig,
    TimeConfig,
    TrainConfig,
    WarmupConfig,
    WatchConfig,
)
from fedmoe_core.config.systems import ALGORITHMS, PLACE, RETIRED, section_of, settings_of

Name = Annotated[str, Meta(min_length=1)]
Tiers = Annotated[tuple[str, ...], Meta(min_length=1)]


@dataclass(frozen=True)
class Config:
    """Everything that decides a run. Saved, resolved, as ``config.toml`` in the run directory.

    ``settings`` are those of a system from elsewhere that declares some (``systems.settings_of``): an instance of the
    dataclass it declares. They stand in the section that bears the system's name. None for every other system.

    Raises:
        ValueError: a value of the wrong type, out of range, or at odds with another; one sentence with the remedy.

    Example:
        >>> config = Config(clients=4, budgets=("memory=25%", "memory=100%"))
        >>> config.clients, config.train.lr
        (4, 0.002)
        >>> Config(clients=0)
        Traceback (most recent call last):
        ValueError: clients=0 does not fit; give a whole number of at least 1
    """

    # the system that runs: one that `fedmoe systems` lists, one of another package, or a class of your own
    algorithm: Annotated[str, Meta(examples=[*ALGORITHMS, PLACE])] = "hfedmoe"
    # stdlib: text of this Python's standard library; a CSV of labelled rows; a JSON Lines file; a folder with one
    # sub-folder a domain; parquet files; a folder of Dataset.save_to_disk; spam; own: a plain model's
    data: Annotated[
        str, one_of("stdlib", "csv:FILE", "jsonl:FILE", "folder:DIR", "parquet:FILE_OR_DIR", "hf:DIR", "spam:DIR", OWN)
    ] = "stdlib"
    # trained on public text; auto: bpe, or bpe-lower for labelled data; a saved model brings its own
    tokenizer: Annotated[str, one_of("auto", "bpe", "bpe-lower", "word")] = "auto"
    # tiny: built from [model_config]; else a directory, or a hub id of the form owner/name; smollm2 or dense:DIR: a
    # dense model, split into experts by [split]; own: a plain model
    model: Name = "tiny"
    # entry point that opens the model; for a plain torch model MODULE:NAME, or own where it is handed over in Python
    adapter: Name = "transformers"
    clients: Positive = 10  # number of clients
    clients_per_round: Natural = 0  # clients drawn in each round; 0 = all
    rounds: Positive = 8  # number of rounds
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0  # decides all that is random
    # which client owns which data; auto: domain where the data names domains, else dirichlet:0.5 (labelled) or iid
    partition: Annotated[str, one_of("auto", "domain", "iid", "dirichlet:ALPHA")] = "auto"
    # limits or a device, one text for each tier; the tiers are dealt to the clients in turn
    budgets: Tiers = ("experts=12.5%", "experts=25%", "experts=50%", "experts=100%")
    min_clients: Positive = 1  # fewest accepted updates that change the model
    ranks: Positive = 1  # processes that share the work; the result has the same bits
    threads: Natural = 0  # per client process; 0 = OMP_NUM_THREADS if that is set, else cores divided by ranks
    # where tensors live; auto: a GPU if torch sees one
    device: Annotated[str, one_of("auto", "cpu", "cuda", "cuda:INDEX")] = "auto"
    cache: str = ""  # folder of cached warm-ups and encoded text; empty = the user's cache folder
    out: Name = "runs/last"  # the run directory
    model_config: ModelConfig = field(default_factory=ModelConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    cohort: CohortConfig = field(default_factory=CohortConfig)
    time: TimeConfig = field(default_factory=TimeConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    aggregation: AggregationConfig = field(default_factory=AggregationConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    fedmoe: FedMoEConfig = field(default_factory=FedMoEConfig)
    flex_moe: FlexMoEConfig = field(default_factory=FlexMoEConfig)
    plus: PlusConfig = field(default_factory=PlusConfig)
    fft_moe: FftMoEConfig = field(default_factory=FftMoEConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    flux: FluxConfig = field(default_factory=FluxConfig)
    fc_moe: FcMoEConfig = field(default_factory=FcMoEConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    settings: Any = None

    def __post_init__(self) -> None:
        for name, record in get_type_hints(Config).items():
            if is_dataclass(record) and type(getattr(self, name)) is not record:
                kind = record.__name__  # type: ignore[union-attr]
                raise ValueError(f"{name}={getattr(self, name)!r} is not a section; give a {kind}")
        own = settings_of(checked("algorithm", self.algorithm, schema_of(Config)["algorithm"]))
        if own is not None and self.settings is None:
            object.__setattr__(self, "settings", own())
        if type(self.settings) is not (own or type(None)):
            raise ValueError(f"settings={self.settings!r} is not of algorithm={self.algorithm!r}; leave settings out")
        values = flatten(self)
        for key, setting in schema_for(self.algorithm).items():
            checked(key, values[key], setting)
        for tier in self.budgets:
            # Its words; what a share of experts comes to is known with the model.
            budget = Budget.parse(tier, spec_experts=1, plain=lambda count: NOTHING)
            asked = ["mode=buffered"] if self.time.mode == "buffered" else []
            asked += [key for key in ("deadline", "straggle", "target") if getattr(self.time, key)]
            if asked and budget.pace is None:
                raise ValueError(
                    f"time.{asked[0]} needs the speed of every device, and budget {tier!r} states none; add for "
                    "example speed=2e9,downlink=10Mbit,uplink=5Mbit, or name a device profile"
                )
        if self.cohort.memory != "auto":
            try:
                Budget.parse(f"memory={self.cohort.memory}")
            except ValueError:
                given = self.cohort.memory
                raise ValueError(f"cohort.memory={given!r} is not a size; give one such as 4GiB, or auto") from None
        _check_partition(self.partition)
        check_pairs(values)

    @staticmethod
    def load(path: Path | None = None, overrides: Sequence[str] = ()) -> Config:
        """Make a configuration from defaults, then the task's preset, then the TOML file, then ``key=value`` overrides.

        Raises:
            ValueError: an unknown key or value (with the nearest valid one), or a file that is not TOML.
            OSError: the file cannot be read.

        Example:
            >>> Config.load(overrides=["clients=4", "train.lr=1e-3"]).train.lr
            0.001
            >>> Config.load(overrides=["clinets=4"])
            Traceback (most recent call last):
            ValueError: unknown key 'clinets'; did you mean 'clients'?
        """
        tree, common = read_toml(path) if path else {}, schema_of(Config)
        asked = [text for text in overrides if text.partition("=")[0].strip() == "algorithm"]
        named = dict(parse_override(text, common) for text in asked)
        algorithm = named.get("algorithm", tree.get("algorithm", Config.algorithm))
        own = settings_of(checked("algorithm", algorithm, common["algorithm"]))
        schema = schema_for(algorithm)
        chosen = by_key(tree, schema, RETIRED) | dict(parse_override(text, schema) for text in overrides)
        if own is not None:
            given = {key.partition(".")[2]: chosen.pop(key) for key in list(chosen) if key not in common}
            chosen["settings"] = own(**given)
        preset = CLASSIFICATION_DEFAULTS if is_labeled(chosen.get("data", Config.data)) else {}
        if is_dense(chosen.get("model", Config.model)):
            preset = {**preset, **DENSE_DEFAULTS}
        if is_plain(chosen.get("adapter", Config.adapter)):
            preset = PLAIN_DEFAULTS
        return build(Config, {**preset, **chosen})

    def resolved(self) -> Config:
        """Return the same run with this machine's ``threads`` and absolute paths, so that it can go on anywhere."""
        kind, _, file = self.data.partition(":")
        data = f"{kind}:{Path(file).absolute()}" if file else self.data
        directory = self.model not in ("tiny", OWN) and Path(self.model).is_dir()
        model = str(Path(self.model).absolute()) if directory else self.model
        place = model.removeprefix("dense:")
        if place and place != model and Path(place).is_dir():
            model = f"dense:{Path(place).absolute()}"
        asked = os.environ.get("OMP_NUM_THREADS", "")  # of each process, as launchers and batch systems set it
        threads = self.threads or (int(asked) if asked.isdigit() else 0) or max(1, usable_cores() // self.ranks)
        file = self.watch.prometheus and str(Path(self.watch.prometheus).absolute())
        return replace(self, threads=threads, data=data, model=model, watch=replace(self.watch, prometheus=file))

    def to_toml(self) -> str:
        """Return every key and value as TOML; ``Config.load`` of that text gives an equal configuration."""
        return write_toml(flatten(self), schema_for(self.algorithm))

    def decisive(self) -> dict[str, Any]:
        """Return the values that decide results by dotted key: all but where files lie and how many ranks share work.

        Data and model count by kind (``csv``, ``given``) here and by content in ``identity``, never by their path.
        """
        named = {"data": self.data.partition(":")[0], "model": self.model if self.model == "tiny" else "given"}
        return {key: value for key, value in (flatten(self) | named).items() if key not in INDIFFERENT}

    def diff(self, other: Config) -> dict[str, tuple[Any, Any]]:
        """Return the dotted keys that decide results and differ, each with this value and the other; None = absent."""
        return differing(self.decisive(), other.decisive())


# Same results whatever these say; `threads` is not here, because the order of a sum depends on it.
INDIFFERENT = frozenset({"out", "cache", "ranks", "watch.sinks", "watch.prometheus"})

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

# What a pretrained dense model starts from: small steps, and so few tokens that SmolLM2 is fine-tuned in minutes on two
# cores (docs/guides/split.md).
DENSE_DEFAULTS: Mapping[str, object] = {"train.lr": 5e-4, "train.seq_len": 64, "train.local_steps": 4}

# What a plain torch model starts from: it brings its data, and there is no public text to warm up on.
PLAIN_DEFAULTS: Mapping[str, object] = {
    "data": OWN,
    "model": OWN,
    "algorithm": "fedavg",
    "budgets": ("unlimited",),
    "train.trunk": "fedavg",
    "train.batch_size": 32,
}


def usable_cores() -> int:
    """Count the cores that this process may run on."""
    allowed = getattr(os, "sched_getaffinity", None)  # absent outside Linux
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def is_dense(model: str) -> bool:
    """Tell whether ``Config.model`` names a dense model, which is split into experts before a run."""
    return model == "smollm2" or model.startswith("dense:")


def is_labeled(data: str) -> bool:
    """Tell whether ``Config.data`` has labels: every CSV and the mails do, others where a ``label`` is named."""
    kind, _, name = data.partition(":")
    if kind in ("parquet", "hf"):
        return _has_label_column(kind, Path(name))
    if kind != "jsonl":
        return kind in ("csv", "spam")
    if not Path(name).is_file():
        return False  # the data room says so; a pipe would lose its first line here
    try:
        with open(name, encoding="utf-8") as lines:
            first = next((line for line in lines if line.strip()), "")
    except (OSError, UnicodeDecodeError):
        return False  # the data room names the file and the fault
    return '"label"' in first


def _has_label_column(kind: str, path: Path) -> bool:
    """Whether the footer of the (first) parquet file, or what a dataset says of itself, names a column ``label``."""
    try:
        if kind == "hf":
            return "label" in json.loads((path / "dataset_info.json").read_text(encoding="utf-8"))["features"]
        file = min(path.rglob("*.parquet")) if path.is_dir() else path
        if not file.is_file():
            return False
        with open(file, "rb") as content:
            content.seek(-8, os.SEEK_END)
            content.seek(-8 - int.from_bytes(content.read(4), "little"), os.SEEK_END)
            # A name in the footer stands behind its length, in Thrift's compact protocol.
            return b"\x05label" in content.read()
    except (OSError, ValueError, KeyError, TypeError):
        return False  # the data room names the file and the fault


def schema_for(algorithm: str) -> dict[str, Setting]:
    """Return the settings of a run by dotted key: those of every run, then those of the system's own section.

    Raises:
        ValueError: no such system, or its section cannot stand beside the others.
    """
    common, own, section = schema_of(Config), settings_of(algorithm), section_of(algorithm)
    if own is None:
        return common
    if not re.fullmatch(r"[\w-]+", section, re.ASCII):
        raise ValueError(
            f"algorithm={algorithm!r} needs a section [{section}], and such a name may hold letters, digits, _ and -; "
            "rename the system"
        )
    if section in {key.partition(".")[0] for key in common}:
        raise ValueError(f"algorithm={algorithm!r} needs a section [{section}], which is taken; rename the system")
    return common | schema_of(own, f"{section}.")


def flatten(config: Config) -> dict[str, Any]:
    """Return the values of a configuration by dotted key, in the order of the fields; the system's own come last."""
    common = {key: attrgetter(key)(config) for key in schema_of(Config)}
    own = () if config.settings is None else fields(config.settings)
    return common | {f"{section_of(config.algorithm)}.{item.name}": getattr(config.settings, item.name) for item in own}


def _check_partition(partition: str) -> None:
    kind, _, text = partition.partition(":")
    with suppress(ValueError):
        if kind != "dirichlet" or 0 < float(text) < math.inf:
            return
    raise ValueError(f"partition={partition!r} needs a number greater than 0, such as dirichlet:0.5")
