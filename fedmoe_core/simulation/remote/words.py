"""What a device is told by its owner, and what it keeps on its disk between two messages."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import msgspec
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedmoe_core.base.files import replacing, write_whole
from fedmoe_core.config.run_config import Config
from fedmoe_core.messages.wire.greeting import Vocabulary
from fedmoe_core.model.spec import model_hash
from fedmoe_core.simulation.prepare import cache_directory


@dataclass(frozen=True)
class Words:
    """The words of a device's owner; what the owner does not say, the server's configuration says.

    Attributes:
        client: which of the run's clients this device is, from 0.
        text: the owner's own text, as ``data`` names it; empty = this client's part of the run's corpus, for
            rehearsals on one machine.
        data: where the run's corpus lies here, for a rehearsal.
        model: where the model lies here.
        cache: folder for encoded text and for the trunk of the model.
        device: "cpu" or "cuda".
        threads: of torch; 0 = as the server's.
        name: for people.
        budget: this device's limits, as in ``budgets``.
    """

    client: int
    text: str = ""
    data: str = ""
    model: str = ""
    cache: str = ""
    device: str = ""
    threads: int = 0
    name: str = ""
    budget: str = ""

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Words:
        """Read the words of a node's configuration.

        Raises:
            ValueError: an unknown word, one of another type, or no client.
        """
        known = {item.name: int if item.name in ("client", "threads") else str for item in fields(cls)}
        for word, value in given.items():
            if word not in known:
                raise ValueError(f"unknown word {word!r} of a device; known are {', '.join(known)}")
            if type(value) is not known[word]:
                raise ValueError(f"{word}={value!r} of a device is not {known[word].__name__}; write it as one")
        if "client" not in given:
            raise ValueError("a device does not say which client it is; add client=NUMBER, from 0")
        return cls(**given)

    def configure(self, text: str) -> Config:
        """Return the server's configuration with what lies elsewhere on this device.

        Raises:
            ValueError: the text is not a configuration of this version.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "config.toml"
            path.write_text(text, encoding="utf-8")
            config = Config.load(path)
        own = {name: value for name in ("data", "model", "cache", "device") if (value := getattr(self, name))}
        return replace(config, **own, threads=self.threads or config.threads).resolved()


@dataclass(frozen=True)
class Shelf:
    """What a device keeps between two messages: trunks, bases of experts, vocabularies; each under its digest."""

    folder: Path

    @classmethod
    def of(cls, config: Config) -> Shelf:
        """Return the shelf in the cache of a configuration."""
        folder = cache_directory(config) / "from-server"
        folder.mkdir(parents=True, exist_ok=True)
        return cls(folder)

    def trunks(self) -> list[str]:
        """Return the digests of the trunks that lie here."""
        return sorted(path.stem for path in self.folder.glob("*.safetensors"))

    def trunk(self, digest: str) -> dict[str, Tensor] | None:
        """Return a trunk; None where it is missing or damaged."""
        try:
            found = load_file(self.folder / f"{digest}.safetensors")
        except (OSError, SafetensorError):
            return None
        return found if model_hash(found) == digest else None

    def keep_trunk(self, digest: str, trunk: Mapping[str, Tensor]) -> None:
        """Put a trunk here."""
        with replacing(self.folder / f"{digest}.safetensors") as partial:
            save_file(dict(trunk), partial)

    def expert(self, digest: str) -> dict[str, Tensor] | None:
        """Return the frozen base of an expert; None where it is missing or damaged."""
        try:
            found = load_file(self.folder / "experts" / f"{digest}.safetensors")
        except (OSError, SafetensorError):
            return None
        return found if model_hash(found) == digest else None

    def keep_expert(self, digest: str, rows: Mapping[str, Tensor]) -> None:
        """Put the frozen base of an expert here."""
        (self.folder / "experts").mkdir(exist_ok=True)
        with replacing(self.folder / "experts" / f"{digest}.safetensors") as partial:
            save_file({key: row.contiguous() for key, row in rows.items()}, partial)

    def vocabulary(self, digest: str) -> Vocabulary | None:
        """Return a vocabulary; None where it is missing or damaged."""
        try:
            found = msgspec.json.decode((self.folder / f"{digest}.json").read_bytes(), type=Vocabulary)
        except (OSError, msgspec.MsgspecError):
            return None
        return found if found.digest == digest else None

    def keep_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Put a vocabulary here."""
        write_whole(self.folder / f"{vocabulary.digest}.json", msgspec.json.encode(vocabulary).decode())
