"""What a cohort measures while it trains: router statistics and importance of all clients, read off once at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np

from fedmoe_core.client.profiling import IMPORTANCE, ROUTER_FIELDS, profile_of
from fedmoe_core.layer.cohort.layer import CohortMoE
from fedmoe_core.layer.cohort.tape import CohortTape
from fedmoe_core.messages.profile import ClientProfile
from fedmoe_kernels import RouterStats


class CohortSums:
    """Sums over the steps of a round, of every client of a cohort.

    Shapes: L layers, C clients, E experts. They are added up for all clients at once, because 32 clients times 7 sums
    times every layer would be hundreds of launches a step. With a ``tape`` no backward runs, as in ``ProfileSums``.
    """

    def __init__(self, layers: Sequence[CohortMoE], *, tape: CohortTape | None = None) -> None:
        self._layers, self._tape = tuple(layers), tape
        self._chosen_LCE = np.zeros((len(layers), layers[0].clients, layers[0].num_experts))
        self._stats: list[RouterStats] = []
        self._read: tuple[dict[str, np.ndarray], dict[str, np.ndarray]] | None = None

    def add_batch(self) -> None:
        """Take each layer's statistics of the forward that just ran; call once per step."""
        last = [cast(RouterStats, layer.last_stats) for layer in self._layers]
        self._stats = [total + new for total, new in zip(self._stats, last, strict=True)] if self._stats else last
        self._read = None
        if self._tape is not None:
            self._chosen_LCE += self._tape.rows_LCE()

    def rows_LE(self, client: int) -> np.ndarray:
        """Count the rows that each expert of a client has processed so far."""
        found: np.ndarray = self._sums()[1]["rows_B"][:, client]
        return found

    def finish(self, client: int) -> ClientProfile:
        """Return the profile of one client in global coordinates, float64."""
        router, importance = self._sums()
        held_LE = np.zeros((len(self._layers), self._layers[0].num_experts), dtype=bool)
        for held_E, layer in zip(held_LE, self._layers, strict=True):
            held_E[list(layer.trainable[client] + layer.frozen[client])] = True
        return profile_of(
            {name: value[:, client] for name, value in router.items()},
            {name: value[:, client] for name, value in importance.items()},
            held_LE,
        )

    def _sums(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Router statistics (L, C, ...) and importance (L, C, E) on the host, read once."""
        if self._read is None:
            router = {
                name: np.stack([getattr(stats, name).double().cpu().numpy() for stats in self._stats])
                for name in ROUTER_FIELDS
            }
            importance = {name: np.zeros_like(self._chosen_LCE) for name in IMPORTANCE}
            for number, layer in enumerate(self._layers if self._tape is None else ()):
                place_B = layer.places()
                for name, sums in importance.items():
                    sums[number].reshape(-1)[place_B] = getattr(layer.scores, name).double().cpu().numpy()
            importance["rows_B"] += self._chosen_LCE
            self._read = router, importance
        return self._read
