"""The rules on the integers of the exact sums: what n voters say of w numbers becomes one numerator for each number.

Integers are sorted and summed without rounding, so a result has the same bits for every order of voters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def weighted_sum(values_NW: Tensor, weights: Sequence[int]) -> Tensor:
    """Return sum_n weight x value, int64 (W,): the plain numerator.

    Args:
        values_NW: int64, fixed-point deltas.
        weights: N integers.
    """
    return (values_NW * values_NW.new_tensor(weights).view(-1, 1)).sum(dim=0)


def trimmed_mean(values_NW: Tensor, trim: int, den: int) -> Tensor:
    """Return ``den`` times the mean of each column without its ``trim`` least and ``trim`` largest numbers.

    Yin et al. 2018 (arXiv 1803.01498), definition 2: all voters count alike, for a weight is a client's own claim.

    Args:
        values_NW: int64.
        trim: fewer than N / 2.
        den: the denominator that the numerator will be divided by.

    Returns:
        int64 (W,), rounded down.

    Example:
        >>> trimmed_mean(torch.tensor([[1], [2], [3], [1000]]), 1, den=10)
        tensor([25])
    """
    count = len(values_NW)
    kept = values_NW.sort(dim=0).values[trim : count - trim]
    return scaled_mean(kept.sum(dim=0), len(kept), den)


def median(values_NW: Tensor, den: int) -> Tensor:
    """Return ``den`` times the median of each column, of two middle numbers their mean; Yin et al. 2018, definition 1.

    Example:
        >>> median(torch.tensor([[1], [2], [1000]]), den=10)
        tensor([20])
    """
    return trimmed_mean(values_NW, (len(values_NW) - 1) // 2, den)


def scaled_mean(total_W: Tensor, count: int, den: int) -> Tensor:
    """Return floor(total * den / count) with no product above ``den`` times the mean, so that int64 holds it."""
    whole_W = torch.div(total_W, count, rounding_mode="floor")
    return whole_W * den + torch.div((total_W - whole_W * count) * den, count, rounding_mode="floor")


def square_distances(values_NW: Tensor, unit: float) -> Tensor:
    """Return sum_w ((a - b) * unit)^2 for each pair of voters, float64 (N, N); those of blocks of numbers add up."""
    real_NW = values_NW.to(torch.float64).mul_(unit)
    return torch.stack([(real_NW - row_W).square_().sum(dim=1) for row_W in real_NW])


def krum_chosen(distances_NN: Tensor, hostile: int) -> list[int]:
    """Return the places of the N - f voters with the least Krum scores, ascending (multi-Krum).

    Blanchard et al. 2017 (arXiv 1703.02757), section 4: a score is the sum of the squared distances to the N - f - 2
    closest others. Of equal scores the first voter is chosen.

    Args:
        distances_NN: squared distances.
        hostile: f, with N >= 2 f + 3.

    Example:
        >>> places = torch.tensor([0.0, 1.0, 2.0, 3.0, 1000.0])
        >>> krum_chosen((places[:, None] - places).square(), hostile=1)
        [0, 1, 2, 3]
    """
    count = len(distances_NN)
    near_NN = distances_NN.sort(dim=1).values[:, 1 : count - hostile - 1]  # the first is the distance to itself
    order = torch.argsort(near_NN.sum(dim=1), stable=True)
    return sorted(order[: count - hostile].tolist())
