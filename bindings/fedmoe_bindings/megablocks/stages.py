"""What stands in for the two compiled extensions that megablocks imports: `megablocks_ops` and `grouped_gemm`.

Names, arguments and results are those that megablocks 0.10.0 calls; results go into tensors that it has allocated.
Nothing here waits for a GPU. Shapes: R rows sorted by expert, E experts, N x K or P x Q one expert's matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedmoe_kernels import grouped_mm, grouped_outer


def sort(x: Tensor, end_bit: int, x_out: Tensor, iota_out: Tensor) -> None:
    """Write the sorted numbers and where each came from; equal ones stay in order.

    A radix sort would look at `end_bit` bits only; megablocks gives as many as the largest number has.
    """
    values, order = torch.sort(x, stable=True)
    x_out.copy_(values)
    iota_out.copy_(order)


def histogram(x: Tensor, num_bins: int) -> Tensor:
    """Count how often each of 0..num_bins - 1 occurs, int32 (num_bins,); along the last axis of a matrix."""
    rows = x.reshape(-1, x.shape[-1]).long() if x.dim() > 1 else x.view(1, -1).long()
    counts = torch.zeros(rows.shape[0], num_bins, dtype=torch.int32, device=x.device)
    counts.scatter_add_(1, rows, torch.ones_like(rows, dtype=torch.int32))
    return counts.view(*x.shape[:-1], num_bins)


def inclusive_cumsum(x: Tensor, dim: int, out: Tensor) -> None:
    """Write the running sums."""
    out.copy_(torch.cumsum(x, dim))


def exclusive_cumsum(x: Tensor, dim: int, out: Tensor) -> None:
    """Write the running sums before each number."""
    out.copy_(torch.cumsum(x, dim) - x)


def indices(padded_bins: Tensor, block_size: int, block_rows: int, block_columns: int, out: Tensor) -> None:
    """Write the column block of each block of a matrix whose rows have the blocks of their expert only."""
    row = torch.arange(block_rows, device=padded_bins.device)
    expert = torch.searchsorted(padded_bins.long() // block_size, row, right=True)
    column = torch.arange(block_columns, device=padded_bins.device)
    out.copy_((expert[:, None] * block_columns + column).flatten())


def replicate_forward(x: Tensor, bins: Tensor, out: Tensor) -> None:
    """Write x[:, b] to all columns of bin b; `bins` are where bins end."""
    out.copy_(x[:, _bin_of(bins, out.shape[1])])


def replicate_backward(grad: Tensor, bins: Tensor, out: Tensor) -> None:
    """Write the sum of each bin's columns."""
    ends = torch.cat([grad.new_zeros(grad.shape[0], 1), grad.cumsum(1)], dim=1)
    stop = bins.long()
    start = torch.cat([stop.new_zeros(1), stop[:-1]])
    out.copy_(ends[:, stop] - ends[:, start])


def _bin_of(bins: Tensor, count: int) -> Tensor:
    """Return the bin of each of 0..count - 1."""
    return torch.searchsorted(bins.long(), torch.arange(count, device=bins.device), right=True)


def gmm(
    a: Tensor,
    b: Tensor,
    batch_sizes: Tensor,
    trans_a: bool = False,
    trans_b: bool = False,
    c: Tensor | None = None,
) -> Tensor:
    """Return a @ b[e] by row, a @ b[e].T with `trans_b`, or a.T @ b by expert with `trans_a`, on fedmoe's products.

    Differentiable by a and b, but not into `c`.

    Args:
        a: (R, K), or (R, P) with `trans_a`.
        b: (E, K, N), (E, N, K) with `trans_b`, or (R, Q) with `trans_a`.
        batch_sizes: (E,) integers that add up to R, the rows of each expert; on the CPU nothing waits.
        c: where the result goes; None = into a new tensor.

    Raises:
        ValueError: the rows are not all counted, or both operands shall be transposed.
    """
    if trans_a and trans_b:
        raise ValueError("trans_a and trans_b are given; grouped_gemm has no such product, so transpose one by hand")
    ends = batch_sizes.cpu().long().cumsum(0)
    if len(ends) == 0 or int(ends[-1]) != a.shape[0]:
        raise ValueError(f"batch_sizes add up to {int(ends[-1]) if len(ends) else 0}, and a has {a.shape[0]} rows")
    offsets_B1 = torch.cat([ends.new_zeros(1), ends]).to(a.device, non_blocking=True)
    out = grouped_outer(a, b, offsets_B1) if trans_a else grouped_mm(a, b, offsets_B1, transposed=not trans_b)
    return out if c is None else c.copy_(out)


def gmm_op(a: Tensor, b: Tensor, batch_sizes: Tensor, trans_b: bool = False) -> Tensor:
    """Do `gmm` as `grouped_gemm.ops` has it, with fewer arguments."""
    return gmm(a, b, batch_sizes, trans_b=trans_b)
