"""Aggregation of LoRA factors as the papers write it, on tensors of whole clients."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fedmoe_core.algorithms.lora.factors import Factors, Spectrum, kept_ranks, resize, tail_penalty


def hetlora_weights(adapters: Sequence[Factors]) -> Tensor:
    """Return ||B_k A_k||_F / sum_j ||B_j A_j||_F, (K, ...): HetLoRA's sparsity weights (arXiv 2401.06432 [N]).

    ||B A||_F^2 = tr((B^T B)(A A^T)), so no full-sized product is formed [D]. Where all are zero the weights are equal.
    """
    norms = []
    for adapter in adapters:
        a, b = adapter.a.double(), adapter.b.double()
        squared = ((b.mT @ b) * (a @ a.mT)).sum(dim=(-2, -1))
        norms.append(squared.clamp(min=0).sqrt())
    stacked = torch.stack(norms)
    total = stacked.sum(dim=0)
    return torch.where(total > 0, stacked / torch.where(total > 0, total, 1.0), 1.0 / len(adapters))


def separate_mean(adapters: Sequence[Factors], weights: Tensor) -> Factors:
    """Return sum_k w_k A_k and sum_k w_k B_k apart, zero-padded to the largest rank: HetLoRA's aggregation [N].

    Biased: its product is not sum_k w_k B_k A_k, unless all A or all B are the same.

    Args:
        adapters: of the K clients.
        weights: (K,) or (K, ...) over the leading axes, summing to 1.
    """
    rank = max(adapter.rank for adapter in adapters)
    padded = [resize(adapter, rank) for adapter in adapters]
    return Factors(_weighted([one.a for one in padded], weights), _weighted([one.b for one in padded], weights))


def pruned_rank(before: Factors, after: Factors, *, keep_share: float) -> int:
    """Prune as HetLoRA does [N]: the rank falls to floor(gamma r), at least 1, if the tail's norm product has shrunk.

    Leading axes share one rank, so their products are added up [E].

    Raises:
        ValueError: keep_share (gamma) outside (0, 1].
    """
    if not 0 < keep_share <= 1:
        raise ValueError(f"keep_share={keep_share} is outside (0, 1]; it is the share of ranks that pruning keeps")
    keep = kept_ranks(after.rank, keep_share)
    shrunk = float(tail_penalty(after, keep).sum()) < float(tail_penalty(before, keep).sum())
    return keep if shrunk else after.rank


def adapter_sum(adapters: Sequence[Factors], weights: Tensor) -> Spectrum:
    """Return sum_k w_k B_k A_k by its singular values: FlexLoRA (arXiv 2402.11505 [N]).

    Each client then gets its own top r_k.

    The factors are stacked, B = [w_1 B_1 ..], A = [A_1; ..]: their product is exactly the sum. Two QRs reduce them, so
    that the SVD is of (sum r) x (sum r) and not of out x in [D].

    Args:
        adapters: of the K clients, any ranks.
        weights: (K,) or (K, ...) over the leading axes.
    """
    b = torch.cat([_spread(w, one.b) * one.b.double() for w, one in zip(weights, adapters, strict=True)], dim=-1)
    a = torch.cat([one.a.double() for one in adapters], dim=-2)
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.mT)
    u, s, v = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    dtype = adapters[0].a.dtype
    return Spectrum((q_b @ u).to(dtype), s.to(dtype), (v @ q_a.mT).to(dtype))


def flame_weights(
    activations_CLE: np.ndarray, steps_C: np.ndarray, samples_C: np.ndarray, *, temperature: float
) -> np.ndarray:
    """Return FLAME's weights (arXiv 2506.16600 [N]), (C, L, E).

    gamma_i^j = (a_i^j / S_i)^t |D_i|, over its sum among the clients i.

    t = 0 is FedAvg among all clients, whatever they activated. At t > 0 an expert that no client activated has weight 0
    everywhere, so it stays as it is [E].

    Args:
        activations_CLE: a, activations of each expert.
        steps_C: S, local steps.
        samples_C: |D|.
        temperature: t; 2 to 4 was best in the paper.
    """
    rate_CLE = activations_CLE / np.maximum(steps_C, 1)[:, None, None]
    # Rates are divided by the largest of their expert first: the ratio is the same and no power overflows.
    rate_CLE = rate_CLE / np.where(rate_CLE.max(axis=0) > 0, rate_CLE.max(axis=0), 1.0)
    gamma_CLE = rate_CLE**temperature * samples_C[:, None, None]
    total_LE = gamma_CLE.sum(axis=0)
    return np.asarray(gamma_CLE / np.where(total_LE > 0, total_LE, 1.0))


def _spread(weight: Tensor, like: Tensor) -> Tensor:
    """A weight over the leading axes, shaped to multiply matrices."""
    weight = weight.to(like.device, torch.float64)
    return weight if weight.dim() == 0 else weight[..., None, None]


def _weighted(tensors: Sequence[Tensor], weights: Tensor) -> Tensor:
    total = sum(_spread(weight, tensor) * tensor.double() for weight, tensor in zip(weights, tensors, strict=True))
    return torch.as_tensor(total).to(tensors[0].dtype)
