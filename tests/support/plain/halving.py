"""A system of one's own over a plain model: the server moves half as far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedmoe_core.algorithms.base import NextModel
from fedmoe_core.algorithms.plain_fedavg import PlainFedAvg
from fedmoe_core.messages.update import ClientUpdate
from fedmoe_core.server.means import Sums
from fedmoe_core.server.state import ServerState


@dataclass(frozen=True)
class Halving(PlainFedAvg):
    """FedAvg with a server learning rate of one half."""

    def apply(self, state: ServerState, sums: Sums, updates: Sequence[ClientUpdate]) -> NextModel:
        """Move each tensor by half of the mean."""
        moved, memory = PlainFedAvg.apply(self, state, sums, updates)
        return {key: state.params[key].lerp(new, 0.5) for key, new in moved.items()}, memory
