"""Dense models: how one is named, who splits it into experts, and the split that a run starts from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib.metadata import entry_points, version
from itertools import islice
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import Tensor

from fedmoe_core.base.files import json_digest
from fedmoe_core.config.run_config import Config
from fedmoe_core.config.sections import SplitConfig
from fedmoe_core.data.batches import Encoded, public_batches

FIT_LENGTH = 128
ENTRY_POINTS = "fedmoe.splitters"  # by the name of the adapter that then opens the result


@dataclass(frozen=True)
class SplitReport:
    """What a split came to; losses are of the next token in nats, on text that no router was fitted on.

    Attributes:
        dense, moe: model types, such as llama and qwen2_moe.
        layers, experts, top_k: what was split, and how.
        difference: the largest of a logit between the dense model and all experts together with equal weights.
        dense_loss, all_loss: of the dense model, and of all experts by the fitted router.
        few_loss, random_loss: of k of E experts, as split, and where neurons were dealt to experts at random.
        tokens, held_out: tokens that the routers were fitted on, and that were predicted.
    """

    dense: str
    moe: str
    layers: tuple[int, ...]
    experts: int
    top_k: int
    difference: float
    dense_loss: float
    all_loss: float
    few_loss: float
    random_loss: float
    tokens: int
    held_out: int


class Splitter(Protocol):
    """Makes a Mixture of Experts of a dense model; a package registers one under the group ``fedmoe.splitters``."""

    def folder(self, name: str, cache: Path) -> Path:
        """Return the directory of a dense model: ``dense:DIR`` as it is, a named one unpacked into ``cache``.

        Raises:
            ValueError: the name is unknown, or the model's family cannot be split.
            OSError: its files are not there.
        """
        ...

    def digest(self, name: str) -> str:
        """Return the sha256 of a dense model's content in hex.

        Raises:
            OSError: its files are not there.
        """
        ...

    def split(self, folder: Path, out: Path, settings: SplitConfig, tokens_SN: Tensor) -> None:
        """Write the split model into ``out``, a directory that the adapter opens, with the tokenizer's files.

        Args:
            folder: of the dense model.
            out: does not exist yet.
            settings: the experts, their layers, and k.
            tokens_SN: public text, int64, that the routers are fitted on.

        Raises:
            ValueError: the model cannot be split so.
        """
        ...

    def measure(self, folder: Path, out: Path, tokens_SN: Tensor, held_out_SN: Tensor) -> SplitReport:
        """Compare a split model in ``out`` with the dense one in ``folder``, and with a split at random."""
        ...


def find_splitter(adapter: str) -> Splitter:
    """Return the splitter of an adapter's package.

    Raises:
        ValueError: it registers none.
    """
    found = {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}
    if adapter not in found:
        raise ValueError(
            f"adapter {adapter!r} splits no dense models; install fedmoe again, or give a model that has experts"
        )
    return cast(Splitter, found[adapter].load())


def split_of(config: Config, public: Encoded, *, public_sha256: str, cache: Path) -> Path:
    """Return the directory of a run's split model, which is made once and kept in ``cache``.

    Its routers are fitted on public text alone, so no client's text is in the model that all start from.

    Args:
        config: with a dense ``model``.
        public: the public text, encoded by the model's own tokenizer.
        public_sha256: of that text.
        cache: a folder of this version of the code.

    Raises:
        ValueError, OSError: the model cannot be read or split so, or the cache cannot be written.
    """
    splitter = find_splitter(config.adapter)
    made_from = {"model": splitter.digest(config.model), "split": asdict(config.split), "public": public_sha256}
    key = json_digest(made_from | {"torch": version("torch"), "threads": config.threads})
    out = cache / f"split-{key[:32]}"
    if not out.is_dir():
        folder = splitter.folder(config.model, cache)
        splitter.split(folder, out, config.split, fit_tokens(public, config.split.tokens))
    return out


def fit_tokens(text: Encoded, count: int) -> Tensor:
    """Draw windows of ``FIT_LENGTH`` tokens of a text, at least ``count`` tokens of it, int64 (S, FIT_LENGTH)."""
    windows = public_batches(
        text, seed=0, steps=-(-count // FIT_LENGTH), batch_size=1, seq_len=FIT_LENGTH, purpose="split"
    )
    return torch.cat([window.tokens_SN for window in islice(windows, -(-count // FIT_LENGTH))])
