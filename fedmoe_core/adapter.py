"""The one door between the federated layer and a model framework."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fedmoe_core.batch import Batch, Task
from fedmoe_core.graft import GraftSpec
from fedmoe_core.layer import MoE
from fedmoe_core.rows import Rows
from fedmoe_core.update import Evaluation, ParamSpec

ENTRY_POINTS = "fedmoe.adapters"  # the group in which a package registers its adapter


@dataclass(frozen=True)
class ModelSpec:
    """The facts that budgets and plans need of a model; every MoE layer has the same sizes.

    ``head`` names the dense tensors that train even where the trunk is frozen: a classification head, which is fresh.
    ``heads`` is the number of attention heads; 0 = attention cannot be watched.
    """

    family: str
    task: Task
    num_layers: int  # MoE layers only
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    activation: str
    params: tuple[ParamSpec, ...]
    head: frozenset[str] = frozenset()
    heads: int = 0

    @property
    def keys(self) -> frozenset[str]:
        """Keys of every tensor of the state."""
        return frozenset(spec.key for spec in self.params)

    def trained(self, *, train_dense: bool) -> tuple[ParamSpec, ...]:
        """Return the tensors that may train: experts and routers, and of the dense ones all or the head."""
        moving = [spec for spec in self.params if spec.kind != "frozen"]
        return tuple(spec for spec in moving if spec.kind != "dense" or train_dense or spec.key in self.head)


@dataclass(frozen=True)
class PlaceLosses:
    """Losses of one batch by place, (S, N).

    Attributes:
        loss_SN: in nats; of the next token (language modelling), or of the sequence, repeated at each of its places.
        correct_SN: whether that prediction is right.
        counted_SN: places that predict something; the others mean nothing.
        total: what ``evaluate`` gives for the batch.
    """

    loss_SN: Tensor
    correct_SN: Tensor
    counted_SN: Tensor
    total: Evaluation


@dataclass(frozen=True)
class LoraSpec:
    """Adapters on the experts, over frozen base experts, as an algorithm declares them for its run.

    Attributes:
        rank: r of the largest adapters.
        alpha: the adapters' product counts alpha / rank, for every client alike whatever its own rank.
        in_state: whether the global model has the factors: they are then aggregated like experts, and the experts
            themselves never train. False: only plans with a ``lora_rank`` have adapters, made fresh (or from the plan's
            rows) and gone with the round; the experts remain what is aggregated.
    """

    rank: int
    alpha: float
    in_state: bool = True

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0:
            raise ValueError(f"rank={self.rank}, alpha={self.alpha} is out of range; give rank >= 1 and alpha > 0")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class ModelAdapter(Protocol):
    """A live model whose MoE blocks are fedmoe layers; one per process, re-used by every client it simulates."""

    spec: ModelSpec
    model: nn.Module
    moe: tuple[MoE, ...]  # in depth order
    frozen_moe: tuple[MoE, ...]  # original blocks that the layers of ``moe`` are grafted on; usually none

    def state(self) -> dict[str, Tensor]:
        """Return the whole model in global coordinates (keys of ``ParamSpec``), cloned; every expert must be held."""
        ...

    def configure(
        self,
        state: Mapping[str, Tensor],
        *,
        permitted_LE: np.ndarray | None = None,
        trainable_LE: np.ndarray | None = None,
        rows: Rows | None = None,
        alias_LE: np.ndarray | None = None,
        top_k: int | None = None,
        train_dense: bool = False,
        train_router: bool = True,
        train_head: bool | None = None,
        lora_rank: int | None = None,
        lora_seed: int = 0,
        out_scale_L: Sequence[float] | None = None,
        frozen_format: str | None = None,
    ) -> None:
        """Become a sub-model of ``state``: only permitted experts stored, only trainable ones as Parameters.

        None means all experts. ``rows`` (key, then expert id) stand in for the state's own; an absent expert with an
        alias (int (L, E), -1 = none) is served by the slot of that held expert. Dense parameters are copied in place
        from ``state`` and get gradients when ``train_dense``; a classification head trains in any case unless
        ``train_head`` is False. The state is never mutated nor aliased.

        After ``add_lora`` adapters train instead of the permitted experts, cut to the first ``lora_rank`` ranks; where
        the state has no factors they exist only with a ``lora_rank``, fresh from ``lora_seed``. ``out_scale_L`` gives
        each layer's output a trainable factor that starts there. ``frozen_format`` stores the experts
        that do not train in few bits ("int8", "int4", ...), for a cheap look at the whole model.
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
