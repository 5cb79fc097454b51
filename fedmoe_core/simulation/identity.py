"""What a run stands on and its configuration only names: the corpus, the model's weights and the code, as digests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import file_digest, sha256
from importlib import import_module
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedmoe_core.config.run_config import Config, is_dense
from fedmoe_core.config.systems import PLACES, place_of
from fedmoe_core.data.federated import corpus_digest
from fedmoe_core.model.adapter import ENTRY_POINTS
from fedmoe_core.simulation.worlds.dense import find_splitter

PACKAGES = ("fedmoe_core", "fedmoe_kernels")  # and the one that brings the adapter
# What a directory of a model is read from: weights, sizes, tokenizer. A changed README is the same model.
MODEL_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", "tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Identity:
    """Digests of what a run was made from; two runs that differ here cannot be continued or compared as one.

    Attributes:
        corpus_sha256: of the raw text.
        model_sha256: of the files of a model's directory, or ``commit:`` and the revision of a hub model; of a dense
            model before it is split, for the rest is in the configuration; empty for a model that is built from that.
        code: version of fedmoe, and 12 hex digits over the source of its packages.
        torch: its version; sums depend on it.
    """

    corpus_sha256: str
    model_sha256: str
    code: str
    torch: str

    @classmethod
    def of(cls, config: Config, *, corpus_sha256: str | None = None) -> Identity:
        """Digest what ``config`` names as it is now; a hub model must have been loaded once.

        ``corpus_sha256`` is that of a corpus which has been read; None reads its text.

        Raises:
            ValueError, OSError: the corpus or the model cannot be read.
        """
        dense = find_splitter(config.adapter).digest(config.model) if is_dense(config.model) else None
        sources = corpus_sha256 or corpus_digest(config.data), dense or model_digest(config.model)
        return cls(*sources, code_version(config.adapter, config.algorithm), version("torch"))

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> Identity | None:
        """Return the identity that ``facts`` put on record; None where a field is missing or is not text."""
        values = {name: record.get(name) for name in cls.__dataclass_fields__}
        texts = {name: value for name, value in values.items() if isinstance(value, str)}
        return cls(**texts) if len(texts) == len(values) else None

    def facts(self) -> dict[str, str]:
        """Return the fields by name, for JSON."""
        return asdict(self)

    def require_same_sources(self, now: Identity, what: str, config: Config) -> None:
        """Refuse another corpus or another model than ``self``, which ``what`` was made from.

        Raises:
            ValueError: one of them differs; it names both digests.
        """
        for kind, name, then, today in (
            ("data", config.data, self.corpus_sha256, now.corpus_sha256),
            ("model", config.model, self.model_sha256, now.model_sha256),
        ):
            if then != today:
                raise ValueError(
                    f"{what} was made from other content of {kind}={name} (digest {_short(then)} then, {_short(today)} "
                    "now); restore it, or start afresh in another directory"
                )

    def require_same_code(self, now: Identity, what: str) -> None:
        """Refuse to go on with other code or another torch, which may round differently.

        Raises:
            ValueError: one of them differs.
        """
        for name, then, today in (("fedmoe", self.code, now.code), ("torch", self.torch, now.torch)):
            if then != today:
                raise ValueError(
                    f"{what} was made by {name} {then}, and this is {today}; go on with that version, or accept other "
                    "results than those of one uninterrupted run with --other-code"
                )


def model_digest(name: str) -> str:
    """Digest a model's content: its files where ``name`` is a directory, its revision where it is a hub id.

    Returns:
        Hex digits; ``commit:REVISION`` for a hub model in the local cache; empty where there is nothing to digest.

    Raises:
        OSError: a file cannot be read.
    """
    folder = Path(name)
    if folder.is_dir():
        digest = sha256()
        for path in sorted({path for pattern in MODEL_FILES for path in folder.glob(pattern)}):
            with path.open("rb") as file:
                digest.update(f"{path.name}\0{file_digest(file, 'sha256').hexdigest()}\0".encode())
        return digest.hexdigest()
    if "/" not in name:
        return ""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json")
    return f"commit:{Path(found).parent.name}" if isinstance(found, str) else ""


def code_version(adapter: str, algorithm: str = "") -> str:
    """Name the code that runs: the installed version, and 12 hex digits over the source files of its packages.

    Args:
        adapter: name of the model adapter, whose package counts too.
        algorithm: the module of one that is not ours counts too.
    """
    try:
        number = version("fedmoe-core")
    except PackageNotFoundError:
        number = "uninstalled"
    homes = {entry.module.partition(".")[0] for entry in entry_points(group=ENTRY_POINTS, name=adapter)}
    digest = sha256()
    for package in sorted({*PACKAGES, *homes}):
        spec = find_spec(package)
        for root in (spec.submodule_search_locations if spec else None) or ():
            for path in sorted(Path(root).rglob("*")):
                if path.suffix in (".py", ".json"):  # the tables of tiles decide results too
                    digest.update(f"{package}/{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes())
    if algorithm and algorithm not in PLACES:
        module = import_module(place_of(algorithm).partition(":")[0])
        if source := getattr(module, "__file__", None):
            digest.update(Path(source).read_bytes())
    return f"{number}+{digest.hexdigest()[:12]}"


def _short(digest: str) -> str:
    return digest[:12] or "none"
