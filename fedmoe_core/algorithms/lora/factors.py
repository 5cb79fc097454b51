"""Aggregation of LoRA factors of different ranks: HetLoRA, FlexLoRA and FLAME.

An adapter is W + B A with A (..., r, in) and B (..., out, r); leading axes, such as experts, are carried along.
Tags: [N] read through published notes, [D] derived, [E] our reading.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Factors(NamedTuple):
    """The two factors, A (..., r, in) and B (..., out, r)."""

    a: Tensor
    b: Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[-2]

    def product(self) -> Tensor:
        """Return B A, the change of the weights, (..., out, in)."""
        return self.b @ self.a


class Spectrum(NamedTuple):
    """A sum of adapters as U diag(s) V^T: u (..., out, R), s (..., R) descending, v (..., R, in)."""

    u: Tensor
    s: Tensor
    v: Tensor

    def truncate(self, rank: int) -> Factors:
        """Return the best adapter of ``rank`` (padded with zeros if the sum has less): A = V_r^T, B = U_r diag(s_r)."""
        return resize(Factors(self.v[..., :rank, :], self.u[..., :rank] * self.s[..., None, :rank]), rank)


def resize(adapter: Factors, rank: int) -> Factors:
    """Keep the first ``rank`` of the adapter's ranks, padded with zeros (HetLoRA's truncation and zero-padding [N]).

    Padding leaves B A unchanged; truncation drops the last ranks, which is why HetLoRA presses weight into the first.

    Raises:
        ValueError: rank below 1.
    """
    if rank < 1:
        raise ValueError(f"rank {rank} leaves no adapter; give at least 1")
    missing = max(0, rank - adapter.rank)
    a, b = adapter.a[..., :rank, :], adapter.b[..., :rank]
    return Factors(torch.nn.functional.pad(a, (0, 0, 0, missing)), torch.nn.functional.pad(b, (0, missing)))


def tail_penalty(adapter: Factors, keep: int) -> Tensor:
    """Return ||B[:, keep:]||_F ||A[keep:, :]||_F, (...): HetLoRA's addition to the loss, to fade last ranks [N]."""
    tail_a, tail_b = adapter.a[..., keep:, :], adapter.b[..., keep:]
    return torch.linalg.matrix_norm(tail_b) * torch.linalg.matrix_norm(tail_a)


def kept_ranks(rank: int, keep_share: float) -> int:
    """Return floor(gamma r), at least 1: what HetLoRA's pruning leaves [N]."""
    return max(1, math.floor(keep_share * rank + 1e-9))


def flame_share(rows_LE: np.ndarray, *, steps: int, tokens: int, samples: float, temperature: float) -> np.ndarray:
    """Return |D_i| (a_i^j / S_i)^t of one client, which ``flame_weights`` normalises over clients, (L, E), in [0, 1].

    a / S is divided by the tokens of a step, an upper bound of it and the same for all clients, so that it fits a
    weight's range; the normalised weights are those of FLAME [D].

    Args:
        rows_LE: a, activations of each expert.
        steps: S, local steps.
        tokens: tokens of a local step, padding included.
        samples: |D| over the largest |D|.
        temperature: t.
    """
    rate_LE = np.minimum(rows_LE / max(1, steps * tokens), 1.0)
    return np.asarray(samples * rate_LE**temperature)


def flame_rescale(top_k: int, client_k: int) -> float:
    """Return the start of FLAME's learnable output scale s_i: k / k_i, for a client with k_i of k experts [N].

    Raises:
        ValueError: client_k outside 1..top_k.
    """
    if not 1 <= client_k <= top_k:
        raise ValueError(f"a client with {client_k} experts per token is outside 1..{top_k}; change its k")
    return top_k / client_k
