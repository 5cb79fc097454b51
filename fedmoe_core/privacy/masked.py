"""The sums of a round under masks: as the Accumulator's, but the server adds vectors that it cannot read."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from fedmoe_core.config.run_config import Config
from fedmoe_core.messages.plan import ExpertPlan
from fedmoe_core.messages.update import ClientUpdate, refused
from fedmoe_core.privacy.account import EXTRA
from fedmoe_core.privacy.dropping import drops_at
from fedmoe_core.server.accumulator import Accumulator
from fedmoe_core.server.admission import Admission

if TYPE_CHECKING:
    from fedmoe_core.privacy.secure.simulated import SimulatedRound


class MaskedSums:
    """What replaces the Accumulator of a round under ``privacy.secure``.

    A client folds its own update into an empty Accumulator, whose checks are then the client's own, and sends the flat
    vector under masks. The sum of these vectors modulo 2^64 is the vector of all of them, bit for bit.

    Args:
        config: of the run.
        round: from 0.
        clients: of the round, on all ranks.
        empty: makes an Accumulator without clients.
    """

    def __init__(self, config: Config, round: int, clients: Sequence[int], empty: Callable[[], Accumulator]) -> None:
        self._empty, first = empty, empty()
        self.specs, length = first.specs, len(first.flatten())
        drops = {client: step for client in clients if (step := drops_at(config, round, client)) is not None}
        threshold = max(2, math.ceil(config.privacy.threshold * len(clients)))
        self._round = _simulated()(clients, threshold, length=length, key=(config.seed, round), drops=drops)

    def add(self, update: ClientUpdate, plan: ExpertPlan, *, share: float = 1.0) -> Admission:
        """Let a client check, mask and send one update; as ``Accumulator.add``."""
        alone = self._empty()
        outcome = alone.add(update, plan, share=share)
        if outcome.accepted and (reason := self._round.send(plan.client, alone.flatten().cpu().numpy())):
            return replace(outcome, accepted=False, reason=reason)
        return outcome

    def opened(
        self, updates: Sequence[ClientUpdate], plans: Sequence[ExpertPlan], *, together: bool
    ) -> tuple[Accumulator, list[ClientUpdate]]:
        """Return the sums of all clients whose vectors came, and the reports.

        Where too few clients are left the sums are empty, and every report says why.

        Args:
            updates: the reports of all ranks; those that are ok have sent their vectors.
            plans: of the round.
            together: add up the masked sums of all ranks first.
        """
        sums, server = self._empty(), self._round.server
        total_N = server.total_N
        if together:
            masked = torch.from_numpy(total_N.view(np.int64)).to(sums.flatten().device)
            dist.all_reduce(masked)  # integers wrap around 2^64, as the masks do
            total_N = masked.cpu().numpy().view(np.uint64)
        flat_N = self._round.opened(total_N, [update.client for update in updates if update.status == "ok"])
        if flat_N is not None:
            sums.load(torch.from_numpy(flat_N))
            return sums, list(updates)
        plan_of, trouble = {plan.client: plan for plan in plans}, self._round.trouble
        return sums, [
            refused(update, plan_of[update.client], trouble) if update.status == "ok" else update for update in updates
        ]


def _simulated() -> type[SimulatedRound]:
    """The protocol, which needs the package cryptography.

    Raises:
        ValueError: it is not installed.
    """
    try:
        from fedmoe_core.privacy.secure.simulated import SimulatedRound
    except ImportError as error:
        raise ValueError(f"privacy.secure needs cryptography, which is not installed ({error}); {EXTRA}") from error
    return SimulatedRound


def refuse_without_ciphers(config: Config) -> None:
    """Refuse secure aggregation before any work where the package cryptography is missing; raises ValueError."""
    if config.privacy.secure:
        _simulated()
