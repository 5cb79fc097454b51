"""What ranks tell each other of an accepted update before its numbers are compared: weights and norms of its parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Vote:
    """An accepted update without its deltas; L layers, E experts, S summed tensors.

    Attributes:
        client: whose.
        weight: integer weight of the dense tensors; 0 where none were sent.
        share: what its deltas are multiplied by; below 1 where they are stale.
        dense_norm: L2 norm of all dense deltas.
        expert_LE, router_LE: integer weights, int64.
        expert_norm_LE, router_norm_LE: L2 norms of the deltas of each expert and of each router row, float64.
        sent_S: which of the summed tensors it has deltas of, bool.
    """

    client: int
    weight: int
    share: float
    dense_norm: float
    expert_LE: np.ndarray
    router_LE: np.ndarray
    expert_norm_LE: np.ndarray
    router_norm_LE: np.ndarray
    sent_S: np.ndarray

    def weight_of(self, kind: str, layer: int, row: int) -> int:
        """Return the integer weight on a part; 0: it is not a voter."""
        if kind == "dense":
            return self.weight
        return int((self.expert_LE if kind == "expert" else self.router_LE)[layer, row])

    def norm_of(self, kind: str, layer: int, row: int) -> float:
        """Return the L2 norm of what it would change of a part."""
        if kind == "dense":
            return self.dense_norm
        return float((self.expert_norm_LE if kind == "expert" else self.router_norm_LE)[layer, row])


def pack_votes(votes: Sequence[Vote]) -> Tensor:
    """Put votes into one int64 vector, bit for bit; ``unpack_votes`` is the inverse."""
    rows = []
    for vote in votes:
        numbers = np.array([vote.client, vote.weight], dtype=np.int64)
        real = np.array([vote.share, vote.dense_norm], dtype=np.float64)
        tables = [
            vote.expert_LE,
            vote.router_LE,
            vote.expert_norm_LE.view(np.int64),
            vote.router_norm_LE.view(np.int64),
        ]
        rows.append(np.concatenate([numbers, real.view(np.int64), *[t.ravel() for t in tables], vote.sent_S]))
    return torch.from_numpy(np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64))


def unpack_votes(packed: Tensor, layers: int, experts: int, tensors: int) -> list[Vote]:
    """Rebuild the votes of one rank."""
    size = layers * experts
    rows = packed.cpu().numpy().reshape(-1, 4 + 4 * size + tensors)
    votes = []
    for row in rows:
        share, dense_norm = row[2:4].view(np.float64).tolist()
        tables = [row[4 + n * size : 4 + (n + 1) * size].reshape(layers, experts) for n in range(4)]
        votes.append(
            Vote(
                client=int(row[0]),
                weight=int(row[1]),
                share=share,
                dense_norm=dense_norm,
                expert_LE=tables[0],
                router_LE=tables[1],
                expert_norm_LE=tables[2].view(np.float64),
                router_norm_LE=tables[3].view(np.float64),
                sent_S=row[4 + 4 * size :].astype(bool),
            )
        )
    return votes
