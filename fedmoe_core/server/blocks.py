"""Tensors read in blocks, so that no temporary is as large as a tensor, and what a visit of the blocks finds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# Elements per block: the float64 and int64 temporaries of a block stay in cache on a CPU (1.0 ms per million elements
# against 2.2 ms for whole tensors), and stay small next to the sums on a GPU.
BLOCK_CPU = 1 << 17
BLOCK_GPU = 1 << 24
FLOAT32_TINY = torch.finfo(torch.float32).tiny


def row_blocks(rows_B: Tensor, like: Tensor) -> tuple[Tensor, ...]:
    """Cut ``rows_B`` so that rows of ``like`` come in blocks with small temporaries; at least one row each."""
    if not rows_B.numel() or not like.numel():
        return ()
    return rows_B.split(max(1, _block(like) * like.shape[0] // like.numel()))


def cut(block: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut tensors of one shape alike, into views of at most ``block`` values; all of them together are the tensors."""
    first = tensors[0]
    if first.numel() <= block:
        yield tensors
    elif all(tensor.is_contiguous() for tensor in tensors):
        yield from zip(*(tensor.view(-1).split(block) for tensor in tensors), strict=True)
    elif len(first) == 1:
        yield from cut(block, *(tensor[0] for tensor in tensors))
    else:
        rows = max(1, block * len(first) // first.numel())
        for parts in zip(*(tensor.split(rows) for tensor in tensors), strict=True):
            yield from cut(block, *parts)


def end_to_end(tensors: Sequence[Tensor]) -> Tensor | None:
    """View tensors as one flat tensor where they lie end to end in one storage, in this order; else None.

    A model of many small tensors is then handled at once: of 6 tensors with 85 thousand values together, starting the
    operations took longer than the arithmetic.
    """
    first = tensors[0]
    place = first.storage_offset()
    storage = first.untyped_storage().data_ptr()
    for tensor in tensors:
        alike = tensor.dtype == first.dtype and tensor.is_contiguous() and tensor.storage_offset() == place
        if not alike or tensor.untyped_storage().data_ptr() != storage:
            return None
        place += tensor.numel()
    return first.detach().as_strided((place - first.storage_offset(),), (1,))


def square_sum(values: Tensor) -> float:
    """Return the sum of squares in float64, block by block, so that no float64 copy of a whole tensor is made."""
    return sum(_square(part, torch.float64) for (part,) in cut(_block(values), values))


def reach(values: Tensor) -> tuple[float, float]:
    """Return the largest |value| and a number that the sum of squares does not pass, in one visit of memory.

    On a CPU, squares of float32 and of 16 bits are summed in float32, in a third of the time of float64. Whatever their
    order, the sum of n is off by at most n * 2^-24 of it, 1/128 for a block. The result is raised by four times that,
    and by what squares below the normal numbers may have lost.

    Args:
        values: floating, any shape and strides; never changed. NaN and infinity show in the first result.
    """
    narrow = values.device.type == "cpu" and values.dtype != torch.float64
    largest = squares = 0.0
    for (part,) in cut(_block(values), values) if values.numel() else ():
        low, high = (float(edge) for edge in torch.aminmax(part))  # both are NaN where a value is
        largest = math.nan if math.isnan(low) else max(largest, -low, high)  # max() keeps a NaN that it has first
        squares += _square(part, torch.float32 if narrow else torch.float64) * (1 + 1 / 32)
        squares += part.numel() * FLOAT32_TINY
    return largest, squares


def _square(values: Tensor, dtype: torch.dtype) -> float:
    norm = float(torch.linalg.vector_norm(values, dtype=dtype))
    return norm * norm  # norm**2 raises where this is infinite


def _block(like: Tensor) -> int:
    return BLOCK_CPU if like.device.type == "cpu" else BLOCK_GPU
