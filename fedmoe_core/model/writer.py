"""What an adapter offers that can hand a live model to others: files that the framework loads without fedmoe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from fedmoe_core.data.batches import Batch
from fedmoe_core.data.tokenizing import TextTokenizer
from fedmoe_core.model.adapter import ModelAdapter
from fedmoe_core.model.submodel import SubModel


@dataclass(frozen=True)
class Wording:
    """How a model reads text.

    Attributes:
        tokenizer: of the run.
        source: what the configuration calls ``model``: a directory or hub id that may hold the tokenizer's own files.
    """

    tokenizer: TextTokenizer
    source: str


class ModelWriter(ModelAdapter, Protocol):
    """A live model that can be written for its framework; ``hasattr(adapter, "write_model")`` tells."""

    def write_model(
        self, state: Mapping[str, Tensor], submodel: SubModel, folder: Path, *, wording: Wording, batch: Batch
    ) -> None:
        """Write ``submodel`` of ``state`` alone, its tokenizer beside it, into a folder that is there and empty.

        Adapters are merged, rows that stand in for the state's are written, and an expert that another one serves is a
        copy of it. What is written answers ``batch`` as the live model does, or nothing is.

        Raises:
            ValueError: the framework has no such model; one sentence.
        """
        ...

    def write_adapter(
        self, state: Mapping[str, Tensor], start: Mapping[str, Tensor], folder: Path, *, wording: Wording, base: str
    ) -> None:
        """Write the adapters of ``state`` and what its routers changed since ``start``, the tokenizer beside them.

        Args:
            state: after ``add_lora`` with factors in it.
            start: the model that federation started from.
            folder: there and empty.
            wording: how the model reads text.
            base: the name or path under which others find that model.

        Raises:
            ValueError: the framework has no such adapters; one sentence.
        """
        ...
