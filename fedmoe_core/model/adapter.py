"""The one door between the federated layer and a model framework."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from importlib.metadata import entry_points
from typing import Protocol

import torch
from torch import Tensor, nn

from fedmoe_core.data.batches import Batch
from fedmoe_core.layer.graft import GraftSpec
from fedmoe_core.layer.lora import LoraSpec
from fedmoe_core.layer.moe import MoE
from fedmoe_core.model.spec import Evaluation, ModelSpec, PlaceLosses
from fedmoe_core.model.submodel import WHOLE, SubModel

ENTRY_POINTS = "fedmoe.adapters"  # the group in which a package registers its adapter


class ModelAdapter(Protocol):
    """A live model whose MoE blocks are fedmoe layers; one per process, re-used by every client it simulates."""

    spec: ModelSpec
    model: nn.Module
    moe: tuple[MoE, ...]  # in depth order
    frozen_moe: tuple[MoE, ...]  # original blocks that the layers of ``moe`` are grafted on; usually none

    def state(self) -> dict[str, Tensor]:
        """Return the whole model in global coordinates (keys of ``ParamSpec``), cloned; every expert must be held."""
        ...

    def configure(self, state: Mapping[str, Tensor], submodel: SubModel = WHOLE) -> None:
        """Become ``submodel`` of ``state``: only permitted experts stored, only trainable ones as Parameters.

        Dense parameters are copied in place from ``state``. The state is never mutated nor aliased, and nothing of an
        earlier configuration stays. After ``add_lora`` adapters train instead of the permitted experts.
        """
        ...

    def add_lora(self, lora: LoraSpec, *, seed: int) -> dict[str, Tensor]:
        """Let experts carry adapters from now on; return the factors to add to the state, if ``lora.in_state``."""
        ...

    def place_losses(self, batch: Batch, *, log_prior_C: Tensor | None = None) -> PlaceLosses:
        """Return the losses of ``evaluate`` by place, no gradient; the layers measure; ``log_prior_C`` as there."""
        ...

    def attention_received(self, batch: Batch) -> Tensor:
        """Return the attention that each place gets before each MoE layer, (L, S, N), 0 at padding.

        Mean over heads, and over the real places that can see it (itself and those after it).
        """
        ...

    def graft(self, graft: GraftSpec, *, seed: int) -> dict[str, Tensor]:
        """Put a fresh mixture next to every MoE block; return the whole state in the new coordinates.

        The grafted layers become ``moe`` and what ``spec`` describes; the original blocks stay as they are, frozen,
        under their own parameter names (kind "frozen").
        """
        ...

    def trained(self) -> dict[str, Tensor]:
        """Return detached views of what this configuration trains, keyed and shaped as ``ClientUpdate.deltas``."""
        ...

    def loss(
        self,
        batch: Batch,
        *,
        training: bool = True,
        token_dropout: float = 0.0,
        generator: torch.Generator | None = None,
        log_prior_C: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Return the batch's mean loss in nats per predicted token or sample; padding is neither routed nor counted.

        Classification only: ``token_dropout`` treats each real token as padding with that chance, drawn by
        ``generator``; ``log_prior_C`` is added to the logits. ``label_smoothing`` is the share of the target that is
        even over all classes or tokens.
        """
        ...

    def text_loss(self, batch: Batch) -> Tensor:
        """Return the mean next-token loss, whatever the task; a classifier's trunk predicts by its own embedding."""
        ...

    def evaluate(self, batch: Batch, *, with_stats: bool = False, log_prior_C: Tensor | None = None) -> Evaluation:
        """Return loss sum, count and correct predictions, without gradients; ``with_stats`` lets the layers measure.

        ``log_prior_C`` is added to the logits of a classifier.
        """
        ...

    def watch_attention(self) -> AbstractContextManager[list[Tensor | None]]:
        """Record, within the block, what attention the tokens of each MoE layer receive, (S, N), after every forward.

        That is the mean over heads and over the places that see the token; None where attention cannot be watched.
        """
        ...


def find_adapter(name: str) -> object:
    """Return the loader registered under ``name`` in the entry-point group ``fedmoe.adapters``.

    Raises:
        ValueError: no installed package registers that name.
    """
    found = {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}
    if name not in found:
        raise ValueError(f"adapter {name!r} is not installed; installed adapters: {', '.join(sorted(found)) or 'none'}")
    return found[name].load()
