"""Groups of alike experts by random projection, PCA and one fused K-means for all layers (Flux, arXiv 2508.19078)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from sklearn.decomposition import PCA
from torch import Tensor

from fedmoe_core.base.rng import counter_rng

ITERATIONS = 100  # most of K-means; it ends where no label changes
CHUNK = 1 << 16  # weights projected at once: the projection of a 50 MB expert would not fit in memory whole


def expert_features(
    weights: Sequence[tuple[Tensor, Tensor]], *, seed: int, projected: int = 64, components: int = 16
) -> np.ndarray:
    """Return the features of every expert for clustering, (L, E, components): PCA of its weights, as Flux does [N].

    The weights [W_in, W_out] of an expert are flattened and go through a Gaussian random projection first, the same for
    all experts. So PCA meets E vectors of ``projected`` numbers and not of millions [E]; distances survive to about
    1 / sqrt(projected). PCA is fitted on the experts of all layers together.

    Args:
        weights: for each layer, (E, F, H) and (E, H, I).
        seed: of the projection.
        projected, components: sizes after the projection and after PCA, the latter cut to what the data allow.
    """
    total_LED = sum(_projected([layer[part] for layer in weights], seed, part, projected) for part in range(2))
    flat_ND = np.asarray(total_LED).reshape(-1, projected)
    # Fewer experts than components span fewer directions; one expert alone spans none and keeps its projection.
    fit = min(components, projected, len(flat_ND) - 1)
    if fit > 0:
        flat_ND = PCA(n_components=fit, svd_solver="full").fit_transform(flat_ND)
    return flat_ND.reshape(len(weights), -1, flat_ND.shape[1])


def fused_kmeans(features_ND: np.ndarray, layer_N: np.ndarray, clusters_L: np.ndarray, *, seed: int) -> np.ndarray:
    """Cluster experts by cosine in one K-means for all layers (Flux [N]); no cluster spans layers or is empty.

    Every centroid carries the label of its layer, and similarities across layers are masked, so the layers share each
    matrix product and nothing else: the result is that of one K-means per layer. Centroids start by K-means++ under a
    seed of their layer. A cluster that runs empty takes the layer's worst served point of a cluster with company, so
    as many clusters as points are singletons, duplicates or not [E].

    scikit-learn's KMeans does not serve: its centroids are means, not of unit length, so it is not by cosine; and where
    its threads share the points, as 1.9 does from 256 on, its bits depend on how many threads there are.

    Args:
        features_ND: the points.
        layer_N: 0..L-1, the layer of each.
        clusters_L: how many clusters each layer gets, 1..points of the layer, or 0 where it has no point.

    Returns:
        labels_N: 0..sum(clusters_L)-1, layer after layer.

    Raises:
        ValueError: a layer asks for clusters it has no points for, or for none though it has some.
    """
    points_L = np.bincount(layer_N, minlength=len(clusters_L))
    wrong_L = (clusters_L > points_L) | ((clusters_L < 1) & (points_L > 0))
    if wrong_L.any():
        layer = int(np.flatnonzero(wrong_L)[0])
        raise ValueError(
            f"layer {layer}: {clusters_L[layer]} clusters of {points_L[layer]} experts; ask for 1..{points_L[layer]}"
        )
    if not len(features_ND):
        return np.zeros(0, dtype=np.int64)
    unit_ND = _unit(features_ND)
    starts = [_start(unit_ND, np.flatnonzero(layer_N == layer), k, (seed, layer)) for layer, k in enumerate(clusters_L)]
    center_KD = unit_ND[np.concatenate(starts).astype(np.int64)]
    foreign_NK = layer_N[:, None] != np.repeat(np.arange(len(clusters_L)), clusters_L)[None, :]
    labels_N = np.full(len(unit_ND), -1)
    for _ in range(ITERATIONS):
        similarity_NK = np.where(foreign_NK, -np.inf, unit_ND @ center_KD.T)
        new_N = _without_empty(similarity_NK.argmax(axis=1), similarity_NK)
        if (new_N == labels_N).all():
            break
        labels_N = new_N
        sums_KD = np.zeros_like(center_KD)
        np.add.at(sums_KD, labels_N, unit_ND)
        center_KD = _unit(sums_KD)
    return labels_N


def _projected(matrices: Sequence[Tensor], seed: int, part: int, size: int) -> np.ndarray:
    """(L, E, size) of one matrix of all layers, chunk by chunk; each chunk's projection is drawn once."""
    flat = [matrix.detach().reshape(matrix.shape[0], -1) for matrix in matrices]
    total = torch.zeros(len(flat), flat[0].shape[0], size, dtype=torch.float64)
    for chunk, begin in enumerate(range(0, flat[0].shape[1], CHUNK)):
        pieces = [rows[:, begin : begin + CHUNK].to("cpu", torch.float64) for rows in flat]
        draw = counter_rng(seed, "expert-projection", part, chunk).standard_normal((pieces[0].shape[1], size))
        mixing = torch.from_numpy(draw / np.sqrt(size))
        for layer, piece in enumerate(pieces):
            total[layer] += piece @ mixing
    return total.numpy()


def _unit(x_XD: np.ndarray) -> np.ndarray:
    norm_X1 = np.linalg.norm(x_XD, axis=1, keepdims=True)
    return x_XD / np.where(norm_X1 > 0, norm_X1, 1.0)


def _start(unit_ND: np.ndarray, members: np.ndarray, count: int, where: tuple[int, int]) -> np.ndarray:
    """K-means++ within one layer: distinct points, each drawn in proportion to its distance from those before."""
    rng = counter_rng(where[0], "expert-clusters", where[1])
    chosen: list[int] = []
    distance = np.ones(len(members))
    for _ in range(count):
        # Copies of a centroid are at distance 0 (or a rounding away) and are drawn only when nothing else is left.
        weight = np.where(distance > 1e-12, distance, 0.0)
        weight = weight if weight.sum() > 0 else np.isin(np.arange(len(members)), chosen, invert=True) * 1.0
        place = int(np.searchsorted(np.cumsum(weight), rng.random() * weight.sum(), side="right"))
        chosen.append(min(place, int(np.flatnonzero(weight)[-1])))
        distance = np.minimum(distance, 1 - unit_ND[members] @ unit_ND[members[chosen[-1]]])
        distance[chosen] = 0.0
    return members[chosen]


def _without_empty(labels_N: np.ndarray, similarity_NK: np.ndarray) -> np.ndarray:
    """Labels in which every cluster has a point: an empty one takes the worst served point that has company."""
    labels_N = labels_N.copy()
    own_N = np.take_along_axis(similarity_NK, labels_N[:, None], axis=1)[:, 0]
    sizes_K = np.bincount(labels_N, minlength=similarity_NK.shape[1])
    for cluster in np.flatnonzero(sizes_K == 0):
        candidates = np.flatnonzero(np.isfinite(similarity_NK[:, cluster]) & (sizes_K[labels_N] > 1))
        taken = candidates[np.argmin(own_N[candidates])]
        sizes_K[labels_N[taken]] -= 1
        sizes_K[cluster] = 1
        labels_N[taken] = cluster
    return labels_N
