"""What the routers of a cohort say while a block of code runs, to be read client by client.

Shapes: L layers, C clients, T tokens of one client, E experts, K choices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedmoe_core.layer.cohort.layer import CohortMoE
from fedmoe_core.layer.recording import Heard, Tape
from fedmoe_kernels.routing.record import Routing
from fedmoe_kernels.slot_map import SlotMap


@dataclass(frozen=True, eq=False)
class ClientView:
    """One client's part of a cohort's layer: a ``RecordedLayer``.

    Attributes:
        num_experts, top_k, device, trainable_experts, frozen_experts, slot_map, learning: as there.
    """

    num_experts: int
    top_k: int
    device: torch.device
    trainable_experts: tuple[int, ...]
    frozen_experts: tuple[int, ...]
    slot_map: SlotMap
    learning: Mapping[str, Tensor]

    @property
    def experts(self) -> tuple[int, ...]:
        """Expert id of every slot."""
        return self.trainable_experts + self.frozen_experts


class CohortTape:
    """The last forward of each layer of a cohort since the recording began; made by ``recording_cohort``."""

    def __init__(self, layers: Sequence[CohortMoE], heard: Sequence[_HeardOfAll]) -> None:
        self._layers, self._heard = tuple(layers), tuple(heard)

    def of(self, client: int) -> Tape:
        """Return the tape that the client would have alone: its own rows, and its part of each layer.

        Raises:
            ValueError: a layer has not run within the recording.
        """
        heard = [Heard(one.logits_of(client), one.choices()[client]) for one in self._heard]
        return Tape([self._view(number, client) for number in range(len(self._layers))], heard)

    def choices(self, number: int) -> Tensor:
        """Return the expert ids that each client's tokens chose in a layer, padding included, (C, T, K), -1 = none."""
        return self._heard[number].choices()

    def rows_LCE(self) -> np.ndarray:
        """Count the rows of each client's held experts, as ``Tape.rows_E``; one host sync a layer."""
        first = self._layers[0]
        rows = np.zeros((len(self._layers), first.clients * first.num_experts))
        for rows_N, layer, heard in zip(rows, self._layers, self._heard, strict=True):
            rows_N[layer.places()] = heard.counts_B()
        return rows.reshape(len(rows), first.clients, first.num_experts)

    def _view(self, number: int, client: int) -> ClientView:
        layer, heard = self._layers[number], self._heard[number]
        learning = {name: each[client] for name, each in heard.learning().items()}
        return ClientView(
            layer.num_experts,
            layer.top_k,
            layer.device,
            layer.trainable[client],
            layer.frozen[client],
            layer.slot_maps[client],
            {name: rows for name, rows in learning.items() if rows.numel()},
        )


class _HeardOfAll:
    """One layer's last forward, of all clients; cut into those of each when that is asked for."""

    def __init__(self, layer: CohortMoE) -> None:
        self._layer = layer
        self._last: tuple[Tensor, Routing, Tensor | None] | None = None
        self._each: tuple[Tensor, ...] = ()
        self._learning: dict[str, tuple[Tensor, ...]] | None = None

    def hear(self, logits_TE: Tensor, routing: Routing, valid_T: Tensor | None) -> None:
        self.clear()
        self._last = logits_TE, routing, valid_T

    def clear(self) -> None:
        self._last, self._each, self._learning = None, (), None

    def logits_of(self, client: int) -> Tensor:
        """The logits of a client's real tokens; one host sync for all clients."""
        if not self._each:
            logits_TE, _, valid_T = self._heard()
            if valid_T is None:
                self._each = logits_TE.unflatten(0, (self._layer.clients, -1)).unbind()
            else:
                count_C = valid_T.unflatten(0, (self._layer.clients, -1)).sum(1)
                self._each = logits_TE[valid_T].split(count_C.tolist())
        return self._each[client]

    def choices(self) -> Tensor:
        return self._heard()[1].experts_TK.unflatten(0, (self._layer.clients, -1))

    def counts_B(self) -> np.ndarray:
        found: np.ndarray = self._heard()[1].counts_B.cpu().numpy()
        return found

    def learning(self) -> dict[str, tuple[Tensor, ...]]:
        """Every Parameter, cut into the clients' rows once for all of them."""
        if self._learning is None:
            self._learning = {name: self._layer.learning_of_each(name) for name in self._layer.learning}
        return self._learning

    def _heard(self) -> tuple[Tensor, Routing, Tensor | None]:
        if self._last is None:
            raise ValueError("a layer of the cohort has nothing on the tape; run a forward within `recording_cohort`")
        return self._last


@contextmanager
def recording_cohort(layers: Sequence[CohortMoE]) -> Iterator[CohortTape]:
    """Record, within the block, what ``recording`` does of every forward of a cohort's ``layers``.

    Example:
        >>> from fedmoe_core import MoE
        >>> from fedmoe_core.layer.cohort.parts import ClientLayer
        >>> alone = [MoE(8, 16, 4, 2), MoE(8, 16, 4, 2, permitted=[True, True, False, False])]
        >>> together = CohortMoE(alone[0], [ClientLayer.of(layer) for layer in alone])
        >>> with recording_cohort([together]) as tape:
        ...     y = together(torch.zeros(10, 8))
        ...     tape.of(1).take_logits(0).shape, tape.of(1).rows_E(0).sum()
        (torch.Size([5, 4]), np.float64(10.0))
    """
    heard = [_HeardOfAll(layer) for layer in layers]
    for layer, one in zip(layers, heard, strict=True):
        layer.recorder = one.hear
    try:
        yield CohortTape(layers, heard)
    finally:
        for layer, one in zip(layers, heard, strict=True):
            layer.recorder = None
            one.clear()
