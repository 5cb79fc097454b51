"""Which neurons of a dense MLP go into one expert: equal groups of neurons that fire on like inputs."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import normalize

MOST_ROUNDS = 15


def balanced_clusters(gate_IH: Tensor, up_IH: Tensor, experts: int, *, seed: int) -> Tensor:
    """Return the expert of each neuron, int64 (I,), I / E of each.

    Balanced k-means of the neurons' input rows [gate, up], each at length 1: the centres are moved to the mean of their
    neurons and the neurons dealt again, all at once, by the exact assignment with equal shares. It ends where nothing
    moves, or after ``MOST_ROUNDS``. No data is needed. MoEfication (arXiv 2110.01786) clusters the rows of the input
    matrix so [A]; both matrices of a gated MLP, the exact assignment and the end are ours [E].

    Args:
        gate_IH, up_IH: the rows of the dense MLP's two input matrices.
        experts: E, which divides I.
        seed: of the neurons that the first centres are.
    """
    rows_IF = torch.cat([normalize(gate_IH.float(), dim=1), normalize(up_IH.float(), dim=1)], dim=1).cpu()
    width = len(rows_IF)
    size = width // experts
    generator = torch.Generator().manual_seed(seed)
    centres_EF = normalize(rows_IF[torch.randperm(width, generator=generator)[:experts]], dim=1)
    expert_I = torch.full((width,), -1)
    for _ in range(MOST_ROUNDS):
        cost_IP = -(rows_IF @ centres_EF.T).repeat_interleave(size, dim=1)  # P places, `size` in each expert
        _, place_I = linear_sum_assignment(cost_IP.numpy())
        dealt_I = torch.from_numpy(place_I) // size
        if torch.equal(dealt_I, expert_I):
            break
        expert_I = dealt_I
        sums_EF = torch.zeros_like(centres_EF).index_add_(0, expert_I, rows_IF)
        centres_EF = normalize(sums_EF, dim=1)
    return expert_I


def random_clusters(width: int, experts: int, *, seed: int) -> Tensor:
    """Return equal groups drawn at random, int64 (I,): what a split by knowledge is measured against."""
    return torch.randperm(width, generator=torch.Generator().manual_seed(seed)) % experts


def neurons_of(expert_I: Tensor, experts: int) -> Tensor:
    """Return the neurons of each expert in ascending order, int64 (E, I / E)."""
    return expert_I.argsort(stable=True).view(experts, -1)
