"""What stands in for `megablocks.backend.kernels`: the copies of tokens to rows and back, in torch, on any device.

Names and arguments are those that megablocks 0.10.0 calls. Shapes: T tokens, top_k choices each, R = T * top_k,
E experts of C rows at most ("binned", where what exceeds C is dropped), H hidden. `indices` (R,) says which place
t * top_k + j each sorted row comes from, `bin_ids` (R,) its expert, `bins` (E,) where the experts' rows end, and
`padded_bins` where they end once every expert's rows are rounded up. `weights` (R,) are by place; None = all 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedmoe_bindings.megablocks.rows import products, summed


def gather(x: Tensor, indices: Tensor, bin_ids: Tensor, weights: Tensor | None, bins: Tensor, top_k: int) -> Tensor:
    """Return (R, H): each row's token, times the weight of its place."""
    del bin_ids, bins  # rows lie without gaps
    return _taken(x, indices.long(), weights, top_k)


def scatter(x: Tensor, indices: Tensor, bin_ids: Tensor, weights: Tensor | None, bins: Tensor, top_k: int) -> Tensor:
    """Return (T, H): the sum of each token's rows times their weights; x (R, H)."""
    return padded_scatter(x, indices, bin_ids, weights, bins, bins, top_k)


def scatter_wgrad(x: Tensor, grad: Tensor, indices: Tensor, bin_ids: Tensor, bins: Tensor, top_k: int) -> Tensor:
    """Return (R,): the gradient of `scatter` by its weights; grad (T, H)."""
    return padded_scatter_wgrad(x, grad, indices, bin_ids, bins, bins, top_k)


def padded_gather(
    x: Tensor,
    indices: Tensor,
    bin_ids: Tensor,
    weights: Tensor | None,
    bins: Tensor,
    padded_bins: Tensor,
    top_k: int,
) -> Tensor:
    """Do `gather` into (padded_bins[-1], H), zeros where an expert has no row; one wait for the device."""
    out = x.new_zeros(int(padded_bins[-1]), x.shape[1])
    return out.index_copy_(0, _padded(bin_ids, bins, padded_bins), _taken(x, indices.long(), weights, top_k))


def padded_scatter(
    x: Tensor,
    indices: Tensor,
    bin_ids: Tensor,
    weights: Tensor | None,
    bins: Tensor,
    padded_bins: Tensor,
    top_k: int,
) -> Tensor:
    """Do `scatter` from padded rows."""
    rows_TK = _by_place(_padded(bin_ids, bins, padded_bins), indices, top_k)
    return summed(x, rows_TK, None if weights is None else weights.view(rows_TK.shape))


def padded_scatter_wgrad(
    x: Tensor, grad: Tensor, indices: Tensor, bin_ids: Tensor, bins: Tensor, padded_bins: Tensor, top_k: int
) -> Tensor:
    """Return (R,): the gradient of `padded_scatter` by its weights."""
    rows_TK = _by_place(_padded(bin_ids, bins, padded_bins), indices, top_k)
    return products(x, grad, rows_TK).flatten().to(x.dtype)


def binned_gather(
    x: Tensor, indices: Tensor, weights: Tensor | None, bins: Tensor, expert_capacity: int, top_k: int
) -> Tensor:
    """Return (E, C, H): the first C rows of each expert, zeros where it has fewer."""
    ends_E1, starts_E1 = bins.long()[:, None], _starts(bins)[:, None]
    row_EC = starts_E1 + torch.arange(expert_capacity, device=x.device)
    absent_EC = row_EC >= ends_E1
    place_X = indices.long()[row_EC.clamp(max=max(0, indices.shape[0] - 1)).flatten()]
    taken = _taken(x, place_X, weights, top_k).masked_fill(absent_EC.flatten()[:, None], 0)
    return taken.view(*row_EC.shape, x.shape[1])


def binned_scatter(x: Tensor, indices: Tensor, weights: Tensor | None, bins: Tensor, top_k: int) -> Tensor:
    """Return (T, H): the sum of each token's rows times their weights, where they were not dropped; x (E, C, H)."""
    rows_TK = _by_place(_binned(indices, bins, x.shape[1]), indices, top_k)
    return summed(x.reshape(-1, x.shape[2]), rows_TK, None if weights is None else weights.view(rows_TK.shape))


def binned_scatter_wgrad(x: Tensor, grad: Tensor, indices: Tensor, bins: Tensor, top_k: int) -> Tensor:
    """Return (R,): the gradient of `binned_scatter` by its weights, 0 where a row was dropped."""
    rows_TK = _by_place(_binned(indices, bins, x.shape[1]), indices, top_k)
    return products(x.reshape(-1, x.shape[2]), grad, rows_TK).flatten().to(x.dtype)


def _taken(x: Tensor, places: Tensor, weights: Tensor | None, top_k: int) -> Tensor:
    rows = x[places // top_k]
    return rows if weights is None else rows * weights[places].to(rows.dtype)[:, None]


def _starts(bins: Tensor) -> Tensor:
    """Return where each bin begins, int64."""
    return torch.cat([bins.new_zeros(1), bins[:-1]]).long()


def _padded(bin_ids: Tensor, bins: Tensor, padded_bins: Tensor) -> Tensor:
    """Return where each sorted row lies once the experts' rows are rounded up."""
    shift_E = _starts(padded_bins) - _starts(bins)
    return torch.arange(bin_ids.shape[0], device=bin_ids.device) + shift_E[bin_ids.long()]


def _binned(indices: Tensor, bins: Tensor, capacity: int) -> Tensor:
    """Return where each sorted row lies in (E * C, H), -1 where it was dropped."""
    row_R = torch.arange(indices.shape[0], device=indices.device)
    expert_R = torch.searchsorted(bins.long(), row_R, right=True)
    within_R = row_R - _starts(bins)[expert_R]
    return (expert_R * capacity + within_R).masked_fill(within_R >= capacity, -1)


def _by_place(row_R: Tensor, indices: Tensor, top_k: int) -> Tensor:
    """Order rows by the place that they come from: (T, top_k)."""
    return torch.empty_like(row_R).index_copy_(0, indices.long(), row_R).view(-1, top_k)
