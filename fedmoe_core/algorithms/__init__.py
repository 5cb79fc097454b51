"""Federated algorithms, one file each: ``init``, ``plan``, ``client`` and ``apply`` over an immutable state."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Protocol

from torch import Tensor

from fedmoe_core.aggregate import Sums
from fedmoe_core.client import LocalResult
from fedmoe_core.names import ALGORITHMS, PLACES
from fedmoe_core.plan import ExpertPlan
from fedmoe_core.state import Population, ServerState
from fedmoe_core.update import ClientUpdate


class Algorithm(Protocol):
    """What the simulator asks of an algorithm. All four are pure: same arguments, same answer, on every rank."""

    population: Population

    def init(self, params: dict[str, Tensor]) -> ServerState:
        """The state before the first round."""
        ...

    def plan(self, state: ServerState, clients: Sequence[int]) -> list[ExpertPlan]:
        """One plan per sampled client, each inside that client's budget."""
        ...

    def client(self, plan: ExpertPlan, result: LocalResult) -> ClientUpdate:
        """What a client that finished its plan sends back: its deltas under this algorithm's weights."""
        ...

    def apply(self, state: ServerState, sums: Sums, updates: Sequence[ClientUpdate]) -> ServerState:
        """The next state. ``sums`` are exact and over all ranks; ``updates`` carry no deltas here, only reports."""
        ...


def find_algorithm(name: str, population: Population) -> Algorithm:
    """The algorithm called ``name``, for this population.

    Raises:
        ValueError: no such algorithm; the message names the nearest.
    """
    if name not in PLACES:
        near = get_close_matches(name, ALGORITHMS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(ALGORITHMS)}"
        raise ValueError(f"algorithm {name!r} is not implemented; {hint}")
    module, _, attribute = PLACES[name].partition(":")
    return getattr(import_module(module), attribute)(population)
