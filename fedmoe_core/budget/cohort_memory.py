"""The peak memory of a cohort: what its clients share once, what each has of its own, and what grows with their tokens.

Shapes: L MoE layers, E experts, C clients.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        lora_rank: of its plan.
        early: whether gradients of all that trains are there before the backward of the layers begins, because an
            auxiliary loss is of what trains itself.
    """

    costs: CostModel
    permitted_LE: np.ndarray
    trainable_LE: np.ndarray
    top_k: int
    own_rows: bool = False
    lora_rank: int | None = None
    early: bool = False

    @property
    def trained_bytes(self) -> int:
        """Return the weights of what it trains."""
        costs = self.costs
        of_experts = int(self.trainable_LE.sum()) * costs.gradient_bytes // costs.grad_bytes
        return (of_experts + costs.trunk_trainable) * costs.weight_bytes

    @property
    def unmoved_bytes(self) -> int:
        """Return the peak that it has alone in a step without optimizer state: the most that a probe may need."""
        costs, trains = self.costs, int(self.trainable_LE.sum())
        whole = costs.memory(self.permitted_LE, self.trainable_LE, top_k=self.top_k)
        return whole - trains * costs.state_bytes - costs.trunk_trainable * costs.kept_bytes

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
        running = [
            (costs.gradients(stage, of=stages, at_least=at_least) + self._early(stage, of=stages)) * trains_LE
            for stage in range(stages)
        ]
        return [whole, *(resident + int(each_LE.sum()) for each_LE in running)]

    def _early(self, stage: int, *, of: int) -> np.ndarray:
        """Bytes (L, 1) of early gradients of an expert that trains, beyond those which the stage has anyway.

        Those of layers whose backward is still to come, and a second time those of one layer, which are being added.
        """
        layers = self.costs.num_layers
        layer_L1 = np.arange(layers)[:, None]
        if not self.early:
            return np.zeros_like(layer_L1)
        running = 0 if of == 1 else layers - stage
        waits_L1, added_L1 = layer_L1 < running, layer_L1 == min(running, layers - 1)
        return self.costs.gradient_bytes * (waits_L1.astype(int) + added_L1)


def cohort_memory(costs: CostModel, shares: Sequence[Share], transients: Sequence[int]) -> int:
    """Predict the peak of a cohort's step, in bytes; at least what is measured.

    Args:
        costs: the cost model of a client that is asked for nothing more than training.
        shares: the clients.
        transients: bytes that no client owns (activations, temporaries) in each stage of the backward of as many.

    Raises:
        ValueError: clients of different k'.
    """
    if any(share.top_k != shares[0].top_k for share in shares):
        raise ValueError("the clients of a cohort have one top_k; group them by it")
    own = np.sum([share.bytes() for share in shares], axis=0)
    # What a plan asks besides may keep buffers, and those are each client's own.
    buffers = sum(share.costs.trunk.buffer_bytes - costs.trunk.buffer_bytes for share in shares)
    return _common(costs) + buffers + int((own + np.array([0, *transients])).max()) - _stored_once(shares)


def probing_memory(shares: Sequence[Share], asked: Sequence[tuple[Share, int]]) -> int:
    """Bound the peak while clients measure, one after another, each on its sub-model alone; 0 where none is asked to.

    The cohort is over then. Of it there is left what the clients have trained; optimizer state is gone.

    Args:
        shares: all clients of the cohort.
        asked: those that measure, each with the bytes that its plan declares for it.
    """
    if not asked:
        return 0
    trained = sum(share.trained_bytes for share in shares)
    return trained + max(max(declared, share.unmoved_bytes) for share, declared in asked)


def transients_of(share: Share, clients: int, peaks: Sequence[int]) -> tuple[int, ...]:
    """Take from measured peaks what the clients own; the rest are the transients of a cohort of that many.

    Args:
        share: each client of the cohort that was measured.
        clients: how many they were.
        peaks: bytes in each stage.
    """
    # The few bytes kept per slot are not taken off: a cohort with fewer slots than these stays bounded.
    slots = clients * int(share.permitted_LE.sum()) * share.costs.slot_bytes
    fixed = _common(share.costs) - _stored_once([share] * clients) - slots
    own = share.bytes(at_least=True)[1:]
    return tuple(max(0, peak - fixed - clients * each) for peak, each in zip(peaks, own, strict=True))


def _common(costs: CostModel) -> int:
    """Bytes that are there once: trunk, buffers, and the layers of one client that wait outside with one expert."""
    waiting = costs.router_bytes + costs.num_layers * costs.frozen_bytes
    return costs.trunk_params * costs.weight_bytes + costs.trunk.buffer_bytes + waiting


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
