"""Recording: what the routers of layers say while a block of code runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fedmoe_core.layer.moe import MoE
from fedmoe_kernels.routing.record import Routing
from fedmoe_kernels.slot_map import SlotMap

Recorder = Callable[[Tensor, Routing, Tensor], None]  # see MoE.recorder


class RecordedLayer(Protocol):
    """What a reader of a tape may know of a layer: an ``MoE``, or one client's part of a cohort's layer.

    Attributes:
        num_experts, top_k: as ``MoE``.
        device: of the weights.
        trainable_experts, frozen_experts, experts: ids of the experts held, in the order of their slots.
        slot_map: expert id to slot.
        learning: what trains, by name, with its graph: a row for each trainable expert, see ``ExpertStore``.
    """

    @property
    def num_experts(self) -> int: ...
    @property
    def top_k(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def trainable_experts(self) -> tuple[int, ...]: ...
    @property
    def frozen_experts(self) -> tuple[int, ...]: ...
    @property
    def experts(self) -> tuple[int, ...]: ...
    @property
    def slot_map(self) -> SlotMap: ...
    @property
    def learning(self) -> Mapping[str, Tensor]: ...


class Tape:
    """The last forward of each layer since the recording began; made by ``recording``.

    Attributes:
        layers: the layers that are recorded, in the order of their numbers.
    """

    def __init__(self, layers: Sequence[RecordedLayer], heard: Sequence[Heard]) -> None:
        """Begin with what was ``heard`` of each of ``layers``."""
        self.layers, self._heard = tuple(layers), tuple(heard)

    def take_logits(self, number: int) -> Tensor:
        """Return the router logits of a layer's real tokens, (T, E), with their graph, and let go of them.

        They are over the whole router, absent experts included. Each forward can be read once, so that the table
        lives for as long as its reader needs it and not until the end of the block.

        Raises:
            ValueError: the layer has not run within the recording, or its logits were taken before; or the forward kept
                no graph though the router trains, and the logits are taken where gradients are on: a loss of them would
                have a value and no gradient. Take them under ``torch.no_grad`` to read values alone.
        """
        heard = self._heard[number]
        logits_TE, heard.logits_TE = heard.logits_TE, None
        if logits_TE is None:
            raise ValueError(
                f"MoE layer {number} has no logits on the tape; run a forward within `recording` and take them once"
            )
        router = self.layers[number].learning.get("router")
        trains = router is not None and router.requires_grad
        if torch.is_grad_enabled() and trains and not logits_TE.requires_grad:
            raise ValueError(
                f"the logits of MoE layer {number} have no graph, so a loss of them would train nothing; its forward "
                "ran under torch.no_grad, or under checkpoint(use_reentrant=True), for which give use_reentrant=False"
            )
        return logits_TE

    def choices(self, number: int) -> Tensor:
        """Return the expert ids that a layer's tokens chose, padding included, (T, K), -1 = none.

        Raises:
            ValueError: the layer has not run within the recording.
        """
        experts_TK = self._heard[number].experts_TK
        if experts_TK is None:
            raise ValueError(f"MoE layer {number} has no choices on the tape; run a forward within `recording`")
        return experts_TK

    def rows_E(self, number: int) -> np.ndarray:
        """Count a layer's rows of each held expert, (E,); one host sync.

        A choice of an expert that another one serves counts for the one that serves.

        Raises:
            ValueError: as ``choices``.
        """
        layer, chosen_R = self.layers[number], self.choices(number).flatten()
        slots_N = layer.slot_map.slot_of_expert[chosen_R[chosen_R >= 0]]
        rows_E = np.zeros(layer.num_experts)
        rows_E[list(layer.experts)] = torch.bincount(slots_N, minlength=len(layer.experts)).cpu().numpy()
        return rows_E


@contextmanager
def recording(layers: nn.Module | Sequence[MoE]) -> Iterator[Tape]:
    """Record, within the block, router logits and choices of every forward of ``layers``; a later one writes over.

    The tape is blank again after the block. Of recordings within one another the innermost hears the forward. Read
    choices before the experts of a layer change. A replayed CUDA graph runs no Python, so nothing is heard of it.

    Args:
        layers: MoE layers, or a module: all that are in it, in its order.

    Example:
        >>> layer = MoE(8, 16, 4, 2)
        >>> with recording(layer) as tape:
        ...     y = layer(torch.zeros(5, 8))
        >>> with recording([layer]) as tape:
        ...     y = layer(torch.zeros(5, 8))
        ...     tape.take_logits(0).shape, tape.rows_E(0).sum()
        (torch.Size([5, 4]), np.float64(10.0))
    """
    found = [m for m in layers.modules() if isinstance(m, MoE)] if isinstance(layers, nn.Module) else layers
    found = tuple(found)
    heard = [Heard() for _ in found]
    with listening(found, [one.hear for one in heard]):
        try:
            yield Tape(found, heard)
        finally:
            for one in heard:
                one.clear()


@contextmanager
def listening(layers: Sequence[MoE], recorders: Sequence[Recorder]) -> Iterator[None]:
    """Call, within the block, a recorder of each layer in its forwards, see ``MoE.recorder``; then those before it."""
    before = [layer.recorder for layer in layers]
    for layer, recorder in zip(layers, recorders, strict=True):
        layer.recorder = recorder
    try:
        yield
    finally:
        for layer, earlier in zip(layers, before, strict=True):
            layer.recorder = earlier


@dataclass(eq=False)
class Heard:
    """One layer's last forward: the router logits of real tokens, and the choices of all.

    A later forward writes over it.
    """

    logits_TE: Tensor | None = None
    experts_TK: Tensor | None = None

    def hear(self, logits_TE: Tensor, routing: Routing, _: Tensor) -> None:
        """Keep a forward; a ``Recorder``."""
        self.logits_TE, self.experts_TK = logits_TE, routing.experts_TK

    def clear(self) -> None:
        """Forget it."""
        self.logits_TE, self.experts_TK = None, None
