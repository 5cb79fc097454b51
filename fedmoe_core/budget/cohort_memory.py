"""The peak memory of a cohort: what its clients share once, what each has of its own, and what grows with their tokens.

Shapes: L MoE layers, E experts, C clients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedmoe_core.budget.cost_model import CostModel


@dataclass(frozen=True)
class Share:
    """One client of a cohort, as far as memory goes.

    Attributes:
        costs: the cost model of what its plan asks.
        permitted_LE, trainable_LE, top_k: of its plan.
        own_rows: whether it has experts of its own, so that none of its base experts is another client's too.
    """

    costs: CostModel
    permitted_LE: np.ndarray
    trainable_LE: np.ndarray
    top_k: int
    own_rows: bool = False

    def bytes(self, *, at_least: bool = False) -> list[int]:
        """Return what only this client needs: after the backward, then in each stage of it, without transients.

        ``at_least``: of the layer whose backward runs, only the gradients that are sure to exist.
        """
        costs, trains_LE = self.costs, self.trainable_LE
        frozen = int((self.permitted_LE & ~trains_LE).sum())
        head = costs.trunk_trainable * (costs.weight_bytes + costs.kept_bytes)
        aux = costs.aux_tables * costs.tokens * costs.total_experts * 4
        resident = costs.router_bytes + head + aux + frozen * costs.frozen_bytes
        # The other tensors of an expert that trains: weights, adapters, state; gradients come by stages.
        resident += int(trains_LE.sum()) * (costs.held_bytes + costs.state_bytes)
        stages = len(costs.trunk.stages(self.top_k))
        whole = resident + int(trains_LE.sum()) * costs.gradient_bytes + costs.trunk_trainable * costs.grad_bytes
        running = [costs.gradients(stage, of=stages, at_least=at_least) * trains_LE for stage in range(stages)]
        return [whole, *(resident + int(each_LE.sum()) for each_LE in running)]


@dataclass(frozen=True)
class CohortCosts:
    """The cost model of cohorts, measured on two small ones.

    Attributes:
        costs: the cost model of a client that is asked for nothing more than training.
        transients: k' -> for each stage of the backward the bytes that no client owns (activations, temporaries): those
            of any cohort, and those that each client adds.
    """

    costs: CostModel
    transients: Mapping[int, tuple[tuple[int, int], ...]]

    def memory(self, shares: Sequence[Share]) -> int:
        """Predict the peak of a cohort's step, in bytes; at least what is measured.

        Raises:
            ValueError: clients of different k'.
        """
        top_k, clients = shares[0].top_k, len(shares)
        if any(share.top_k != top_k for share in shares):
            raise ValueError("the clients of a cohort have one top_k; group them by it")
        own = np.sum([share.bytes() for share in shares], axis=0)
        transient = [0, *(fixed + each * clients for fixed, each in self.transients[top_k])]
        # What a plan asks besides may keep buffers, and those are each client's own.
        buffers = sum(share.costs.trunk.buffer_bytes - self.costs.trunk.buffer_bytes for share in shares)
        return _common(self.costs) + buffers + int((own + np.array(transient)).max()) - _stored_once(shares)

    @classmethod
    def measured(cls, peaks: Mapping[int, Mapping[int, Sequence[int]]], share: Mapping[int, Share]) -> CohortCosts:
        """Take the peaks of two cohorts of equal clients apart.

        Args:
            peaks: k' -> clients -> peak bytes of each stage.
            share: k' -> each client of those cohorts.
        """
        found = {}
        for top_k, by_clients in peaks.items():
            alike = share[top_k]
            (few, low), (many, high) = (
                (clients, _transients(alike, clients, stages)) for clients, stages in sorted(by_clients.items())
            )
            # Rounded up, and never negative: what a block of the allocator adds must not shrink with the clients.
            slopes = [max(0, math.ceil((above - below) / (many - few))) for below, above in zip(low, high, strict=True)]
            tops = zip(low, high, slopes, strict=True)
            found[top_k] = tuple((max(a - few * slope, b - many * slope), slope) for a, b, slope in tops)
        return cls(next(iter(share.values())).costs, found)


def _common(costs: CostModel) -> int:
    """Bytes that are there once: trunk, buffers, and the layers of one client that wait outside with one expert."""
    waiting = costs.router_bytes + costs.num_layers * costs.frozen_bytes
    return costs.trunk_params * costs.weight_bytes + costs.trunk.buffer_bytes + waiting


def _transients(share: Share, clients: int, stages: Sequence[int]) -> list[int]:
    # The few bytes kept per slot are not taken off: a cohort with fewer slots than these stays bounded.
    slots = clients * int(share.permitted_LE.sum()) * share.costs.slot_bytes
    same = [share] * clients
    fixed = _common(share.costs) - _stored_once(same) - slots
    own = share.bytes(at_least=True)[1:]
    return [peak - fixed - clients * bytes_ for peak, bytes_ in zip(stages, own, strict=True)]


def _stored_once(shares: Sequence[Share]) -> int:
    """Bytes of base experts under adapters that several clients share, beyond the one that is stored."""
    costs = shares[0].costs
    if costs.lora_rank is None:
        return 0
    base = costs.held_bytes - costs.slot_bytes - costs.adapter_params * costs.weight_bytes
    sharing = [share for share in shares if not share.own_rows]
    slots = sum(int(share.permitted_LE.sum()) for share in sharing)
    kinds = [
        np.any([which(share) for share in sharing], axis=0).sum()
        for which in (lambda share: share.trainable_LE, lambda share: share.permitted_LE & ~share.trainable_LE)
        if sharing
    ]
    return base * (slots - int(sum(kinds)))
