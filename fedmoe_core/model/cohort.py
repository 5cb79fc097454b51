"""A cohort as a live model runs it: several clients' sub-models at once, over one trunk that does not train."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from fedmoe_core.data.batches import Batch
from fedmoe_core.layer.cohort.layer import CohortMoE
from fedmoe_core.model.adapter import ModelAdapter
from fedmoe_core.model.spec import Evaluation, PlaceLosses
from fedmoe_core.model.submodel import SubModel


@dataclass(frozen=True, eq=False)
class Stacked:
    """A tensor that every client of a cohort trains, all clients' end to end in one Parameter.

    Attributes:
        key: of the tensor, as in ``ClientUpdate.deltas``.
        parameter: (rows of all clients, ...).
        bounds: where each client's rows begin, and where the last ones end, C + 1 numbers.
        single: each client has one row, which is the whole tensor.
    """

    key: str
    parameter: nn.Parameter
    bounds: tuple[int, ...]
    single: bool = False

    def of(self, client: int) -> Tensor | None:
        """View one client's tensor, detached; None where it trains nothing of it."""
        begin, end = self.bounds[client], self.bounds[client + 1]
        if begin == end:
            return None
        return self.parameter.detach()[begin] if self.single else self.parameter.detach()[begin:end]


@dataclass(frozen=True)
class LossTerms:
    """What the clients of a cohort add to the plain loss of their batches, client after client.

    Attributes:
        alive: clients whose rows run; the others have no rows in any layer, and their loss means nothing.
        token_dropout, label_smoothing: as ``ModelAdapter.loss``, alike for all.
        generators: of each client's token dropout.
        log_priors: what is added to each client's logits; None = nothing.
    """

    alive: tuple[bool, ...]
    token_dropout: float = 0.0
    label_smoothing: float = 0.0
    generators: Sequence[torch.Generator] = ()
    log_priors: Sequence[Tensor] | None = None


class LiveCohort(Protocol):
    """The live model while it is a cohort; it ends with the adapter's next ``configure``."""

    @property
    def layers(self) -> tuple[CohortMoE, ...]:
        """Return the MoE layers in depth order."""
        ...

    @property
    def learning(self) -> tuple[Stacked, ...]:
        """Return all that trains."""
        ...

    def losses(self, batches: Sequence[Batch], terms: LossTerms) -> Tensor:
        """Return the mean loss of each client's batch, (C,), as ``ModelAdapter.loss``; the batches have one shape."""
        ...

    def place_losses(
        self, batches: Sequence[Batch], *, log_priors: Sequence[Tensor] | None = None
    ) -> list[PlaceLosses]:
        """Return what ``ModelAdapter.place_losses`` gives for each client's batch, up to rounding; the layers measure.

        Args:
            batches: one of each client, of one length; they may differ in how many sequences they have, down to none.
                What fills them up is padding.
            log_priors: what is added to each client's logits; None = nothing.
        """
        ...

    def become_alone(self, client: int) -> None:
        """Make the live model one client's trained sub-model, as it would be had the client trained alone.

        The cohort cannot run any more. It keeps what the clients have trained, so another client can follow.
        """
        ...

    def resident(self) -> list[Tensor]:
        """Return every tensor that model and cohort keep between two steps, without gradients and optimizer state."""
        ...


class CohortAdapter(ModelAdapter, Protocol):
    """A ``ModelAdapter`` that serves several clients at once. One that lacks a method serves them one by one."""

    def evaluate_parts(self, batch: Batch, sizes: Sequence[int]) -> list[Evaluation]:
        """Return what ``evaluate`` gives for each stretch of ``sizes`` sequences of a batch, up to rounding."""
        ...

    def become_cohort(
        self,
        state: Mapping[str, Tensor],
        submodels: Sequence[SubModel],
        *,
        tokens: int,
        joined: Callable[[int], None],
    ) -> LiveCohort:
        """Become sub-models of ``state``, one for each client, none of which trains the trunk.

        Args:
            state: as ``configure``.
            submodels: of one kind: the same ``top_k``, adapters' rank, and tensors that train.
            tokens: of one client's step, from the plan; the kernels' tiles are chosen for it.
            joined: called with the place of each client while the live model is that client's alone.

        Raises:
            ValueError: as ``configure``; or clients that differ in kind, or train the trunk.
        """
        ...
