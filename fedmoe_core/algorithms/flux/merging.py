"""Flux's merged experts (arXiv 2508.19078): slots per layer (eq. 1), alike experts made one (eq. 2), tokens re-routed.

An expert that is not tuned is frozen, and one slot can serve a whole cluster of such experts. Tags: [N] read through
published notes, [D] derived, [E] our reading where the paper is silent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedmoe_core.algorithms.flux.clustering import fused_kmeans
from fedmoe_core.base.tensor_key import TensorKey
from fedmoe_core.layer.state import BIASES, MATRICES


@dataclass(frozen=True)
class Merge:
    """Which expert stands for which.

    Attributes:
        alias_LE: the representative of each expert, the smallest id of its cluster; tuned experts represent themselves.
        weight_LE: the expert's share in its representative's weights; they sum to 1 over a cluster.
    """

    alias_LE: np.ndarray
    weight_LE: np.ndarray

    @property
    def stored_LE(self) -> np.ndarray:
        """The representatives: the experts that a client really holds."""
        return self.alias_LE == np.arange(self.alias_LE.shape[1])


def merge_budgets(freq_LE: np.ndarray, merged_LE: np.ndarray, slots: int) -> np.ndarray:
    """Return the slots of merged experts in each layer, (L,): Flux eq. 1 [N], B(l) = floor(share * B).

    The shares are in proportion to b^l = (L - l + 1) / v^l. v^l is the variance of activation frequency over the
    layer's experts: shallow layers, and layers that use their experts evenly, get more. 1e-6 is added to v^l, and B(l)
    is held between 1 and the layer's experts to merge (0 without any). What rounding leaves goes where B(l) is farthest
    below its share; ties to the shallower [E].

    Measured on hand-made layers (`test_merging.py`): output error .12 against .31 of equal slots, where the most used
    experts are tuned and deep layers skewed; but .68 against .57 at top-4, nothing tuned, even layers.

    Args:
        freq_LE: tokens to e / tokens.
        merged_LE: bool, the experts to merge (those not tuned).
        slots: B, at most this many in all.

    Raises:
        ValueError: fewer slots than layers with an expert to merge.
    """
    depth = len(freq_LE)
    return share_out((depth - np.arange(depth)) / (freq_LE.var(axis=1) + 1e-6), merged_LE, slots)


def merge_shares(alias_LE: np.ndarray, freq_LE: np.ndarray, attention_LE: np.ndarray) -> np.ndarray:
    """Return the weights of Flux eq. 2 [N], alpha_e / sum_{e' in cluster} alpha_e', alpha_e = f_e * abar_e, (L, E).

    abar_e is the mean attention score of the tokens that went to e. A cluster that no token used weighs its members
    equally [E].
    """
    alpha_LE = freq_LE * attention_LE
    shares_LE = np.zeros_like(alpha_LE, dtype=np.float64)
    for layer, alias_E in enumerate(alias_LE):
        for representative in np.unique(alias_E):
            members = np.flatnonzero(alias_E == representative)
            total = alpha_LE[layer, members].sum()
            shares_LE[layer, members] = alpha_LE[layer, members] / total if total > 0 else 1 / len(members)
    return shares_LE


def plan_merge(
    features_LED: np.ndarray,
    merged_LE: np.ndarray,
    budgets_L: np.ndarray,
    *,
    freq_LE: np.ndarray,
    attention_LE: np.ndarray,
    seed: int,
) -> Merge:
    """Cluster the experts to merge into ``budgets_L`` clusters per layer, and weigh them by eq. 2.

    Args:
        features_LED: see ``clustering.expert_features``.
        merged_LE: bool; every other expert stands for itself.
        budgets_L: eq. 1, or another division of the slots.
        freq_LE, attention_LE: f_e and abar_e of the client's profile.
        seed: of the K-means.

    Raises:
        ValueError: a layer's budget is outside 1..its experts to merge.
    """
    layer_N, expert_N = np.nonzero(merged_LE)
    labels_N = fused_kmeans(features_LED[merged_LE], layer_N, budgets_L, seed=seed)
    alias_LE = np.tile(np.arange(merged_LE.shape[1]), (len(merged_LE), 1))
    # Experts come in ascending order, so the first of a label is its smallest id.
    _, first, cluster_N = np.unique(labels_N, return_index=True, return_inverse=True)
    alias_LE[layer_N, expert_N] = expert_N[first[cluster_N]]
    return Merge(alias_LE, merge_shares(alias_LE, freq_LE, attention_LE))


def merged_rows(stack: Tensor, merge: Merge, layer: int) -> Tensor:
    """Return W_merged = sum_{e in cluster} share_e W_e: Flux eq. 2 [N]. One row per representative, ascending id.

    A cluster of one is copied bit for bit, so as many slots as experts give back the model.

    Args:
        stack: (E, ...), one weight or bias of all experts of the layer.
        merge, layer: which experts go together.
    """
    alias_E, shares_E = merge.alias_LE[layer], merge.weight_LE[layer]
    rows = stack[torch.from_numpy(np.unique(alias_E)).to(stack.device)].clone()
    for row, representative in enumerate(np.unique(alias_E)):
        members = np.flatnonzero(alias_E == representative)
        if len(members) > 1:
            wide = torch.promote_types(stack.dtype, torch.float32)
            share = torch.from_numpy(shares_E[members]).to(stack.device, wide)
            rows[row] = torch.tensordot(share, stack[torch.from_numpy(members)].to(wide), dims=1).to(stack.dtype)
    return rows


def merged_experts(params: Mapping[str, Tensor], merge: Merge) -> dict[str, Mapping[int, Tensor]]:
    """Return rows of a plan (``ExpertPlan.rows``): the merged weights of every cluster of more than one expert."""
    rows: dict[str, Mapping[int, Tensor]] = {}
    for layer, alias_E in enumerate(merge.alias_LE):
        ids, sizes = np.unique(alias_E, return_counts=True)
        keys = (str(TensorKey(layer, name)) for name in (*MATRICES, *BIASES))
        for key in (key for key in keys if key in params):
            merged = merged_rows(params[key], merge, layer)
            rows[key] = {int(e): row for e, size, row in zip(ids, sizes, merged, strict=True) if size > 1}
    return rows


def share_out(claim_L: np.ndarray, merged_LE: np.ndarray, slots: int) -> np.ndarray:
    """Share ``slots`` out in proportion to the claims, 1..the experts to merge for each layer, by largest remainder.

    Raises:
        ValueError: fewer slots than layers with something to merge.
    """
    most_L = merged_LE.sum(axis=1)
    least_L = (most_L > 0).astype(np.int64)
    if slots < least_L.sum():
        raise ValueError(
            f"{slots} slots cannot hold one merged expert in each of {least_L.sum()} layers; "
            f"give at least {least_L.sum()}, or tune fewer experts"
        )
    claim_L = np.where(most_L > 0, claim_L, 0.0)
    share_L = slots * claim_L / (claim_L.sum() or 1.0)
    given_L = np.clip(np.floor(share_L).astype(np.int64), least_L, most_L)
    while given_L.sum() > slots:
        given_L[np.argmin(np.where(given_L > least_L, share_L - given_L, np.inf))] -= 1
    while given_L.sum() < min(slots, most_L.sum()):
        given_L[np.argmax(np.where(given_L < most_L, share_L - given_L, -np.inf))] += 1
    return given_L
