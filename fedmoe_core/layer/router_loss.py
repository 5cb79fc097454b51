"""Auxiliary losses of a model's routers: the hook that plans carry, and the Switch load-balance loss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from fedmoe_core.layer.recording import Tape


class AuxLoss(Protocol):
    """A differentiable scalar of the routers, added to the task's loss at every local step.

    It reads the tape of the forward that just ran: ``tape.take_logits(l)`` of each of ``tape.layers``, and of these
    what a ``RecordedLayer`` has. Where clients train in a cohort, each has a tape of its own rows. Weights, targets and
    running means are fields of the object, fixed for the round; what should change between rounds comes with the next
    plan.

    Attributes:
        tables: most (T, E) float32 tables per layer that it keeps alive until the backward, gradients included; the
            memory of a plan is predicted with them.
    """

    @property
    def tables(self) -> int: ...

    def __call__(self, tape: Tape) -> Tensor: ...


@runtime_checkable
class EarlyLoss(AuxLoss, Protocol):
    """An auxiliary loss of what trains itself: its gradients are there before the backward of the layers begins.

    Attributes:
        others: as ``tables``, without those gradients; a cohort's memory is predicted with them.
    """

    @property
    def others(self) -> int: ...


@dataclass(frozen=True)
class SwitchBalance:
    """``weight`` x the Switch load-balance loss (arXiv 2101.03961 eqs. 4-6 [P]).

    Attributes:
        weight: factor of the loss (alpha).
        served_only: over the experts that the client can choose, rather than over the whole router.
        tables: see ``AuxLoss``.
    """

    weight: float
    served_only: bool = False
    tables: int = 4

    def __call__(self, tape: Tape) -> Tensor:
        return self.weight * balance_loss(tape, served_only=self.served_only)


def balance_loss(tape: Tape, *, served_only: bool = False) -> Tensor:
    """Return the mean over layers of E * sum_e f_e P_e, a differentiable scalar: 1 when perfectly balanced, up to E.

    f_e is the share of top-k choices that fall on expert e (a constant), P_e the mean softmax probability of e. Both
    are over the real tokens of the last forward and over the whole router, absent experts included. See Switch
    Transformer (arXiv 2101.03961) eqs. 4-6 [P], with f over k choices as in later models. With ``served_only`` the
    router is that of the sub-model: absent experts that no held one serves have no probability, and E counts the rest.

    The tape's logits are taken here, so call once per forward.

    Raises:
        ValueError: as ``Tape.take_logits``.

    Example:
        >>> from fedmoe_core import MoE, recording
        >>> layer = MoE(8, 16, 4, 2)
        >>> with recording(layer) as tape:
        ...     loss = layer(torch.randn(5, 8)).square().mean() + 0.01 * balance_loss(tape)
        >>> loss.backward()
        >>> layer.router.grad.shape
        torch.Size([4, 8])
    """
    losses = []
    for number, layer in enumerate(tape.layers):
        logits_TE = tape.take_logits(number)
        experts, top_k = layer.num_experts, layer.top_k
        if served_only:
            served_E = layer.slot_map.slot_of_expert >= 0
            logits_TE = logits_TE.masked_fill(~served_E, -math.inf)
            experts = int(served_E.sum())
            top_k = min(top_k, experts)
        prob_E = logits_TE.float().softmax(dim=-1).mean(dim=0)
        chosen = logits_TE.detach().topk(top_k, dim=-1).indices.flatten()
        share_E = torch.bincount(chosen, minlength=layer.num_experts).float() / max(chosen.numel(), 1)
        losses.append(experts * (share_E * prob_E).sum())
    return torch.stack(losses).mean()
