"""`grouped_mm` and `grouped_outer`: the plain products that experts are made of, for layers with an activation of
their own.

Shapes: R rows sorted by slot, B slots, N x K or P x Q one slot's matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedmoe_kernels.backends import EXPERT_BACKENDS
from fedmoe_kernels.experts import grouped_ops as ops
from fedmoe_kernels.experts.weights import what

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BACKENDS = tuple(name for name in EXPERT_BACKENDS if name != "reference")


def grouped_mm(
    a_RK: Tensor, w: Tensor, offsets_B1: Tensor, *, transposed: bool = False, backend: str = "auto"
) -> Tensor:
    """Return (R, N): rows offsets_B1[b]..offsets_B1[b + 1] - 1 of a times matrix b of w, and zeros from the last on.

    Differentiable by `a_RK` and `w`. `moe_mlp` does more in less memory for an activation that it knows; this is for
    all others. Two runs with the same inputs and threads give the same bits. Under torch.autocast both operands are
    cast to the autocast dtype. The slot loops read `offsets_B1` on the host; the kernels read nothing back.

    Args:
        a_RK: rows sorted by slot; float32, float64, bfloat16 or float16. Rows from offsets_B1[B] on are never read.
        w: (B, N, K) for a @ w[b].T, the layout of `torch.nn.Linear`. Dtype of a.
        offsets_B1: (B + 1,) int64, from 0 on, never falling, at most R, as in `Routing`; checked where it is read.
        transposed: w is (B, K, N), for a @ w[b].
        backend: "auto", "triton" or "cpu", as in `moe_mlp`.

    Raises:
        ValueError: names the argument that does not fit the others.

    Example:
        >>> import torch
        >>> a, w = torch.ones(3, 2), torch.stack([torch.eye(2), 10 * torch.eye(2)])
        >>> grouped_mm(a, w, torch.tensor([0, 2, 3]))  # two rows of slot 0, one of slot 1
        tensor([[ 1.,  1.],
                [ 1.,  1.],
                [10., 10.]])
    """
    a_RK, w = _autocast(a_RK, w)
    _check("a_RK", a_RK, offsets_B1, backend)
    _check_like("w", w, a_RK)
    depth = 1 if transposed else 2
    if w.dim() != 3 or w.shape[0] != offsets_B1.shape[0] - 1 or w.shape[depth] != a_RK.shape[1]:
        form = "(B, K, N)" if transposed else "(B, N, K)"
        raise ValueError(
            f"w is {what(w)}; for {offsets_B1.shape[0] - 1} slots and rows of {a_RK.shape[1]} it must be {form}"
        )
    return ops.grouped_mm(a_RK.contiguous(), w.contiguous(), offsets_B1.contiguous(), transposed, backend)


def grouped_outer(left_RP: Tensor, right_RQ: Tensor, offsets_B1: Tensor, *, backend: str = "auto") -> Tensor:
    """Return (B, P, Q): left.T @ right over the rows of each slot, zeros for a slot without any.

    The gradient of `grouped_mm` by its matrices, and differentiable itself by both operands.

    Args:
        left_RP, right_RQ: rows sorted by slot, of one dtype; rows from offsets_B1[B] on are never read.
        offsets_B1, backend: as in `grouped_mm`.

    Raises:
        ValueError: names the argument that does not fit the others.
    """
    left_RP, right_RQ = _autocast(left_RP, right_RQ)
    _check("left_RP", left_RP, offsets_B1, backend)
    _check_like("right_RQ", right_RQ, left_RP)
    if right_RQ.dim() != 2 or right_RQ.shape[0] != left_RP.shape[0]:
        raise ValueError(f"right_RQ is {what(right_RQ)}, left_RP {what(left_RP)}; they must have as many rows")
    return ops.grouped_outer(left_RP.contiguous(), right_RQ.contiguous(), offsets_B1.contiguous(), backend)


def _check(name: str, rows: Tensor, offsets_B1: Tensor, backend: str) -> None:
    if rows.dim() != 2 or rows.dtype not in _DTYPES or rows.shape[1] == 0:
        raise ValueError(f"{name} is {what(rows)}; it must be a floating matrix with at least one column")
    if offsets_B1.dim() != 1 or offsets_B1.dtype != torch.int64 or offsets_B1.shape[0] < 2:
        raise ValueError(f"offsets_B1 is {what(offsets_B1)}; it must be int64 (B + 1,) for at least one slot")
    if offsets_B1.device != rows.device:
        raise ValueError(f"offsets_B1 is on {offsets_B1.device}, {name} on {rows.device}; move one of them")
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} does not exist here; choose one of {', '.join(BACKENDS)}")


def _check_like(name: str, value: Tensor, rows: Tensor) -> None:
    if value.dtype != rows.dtype or value.device != rows.device:
        raise ValueError(
            f"{name} is {value.dtype} on {value.device}, the rows {rows.dtype} on {rows.device}; convert one"
        )


def _autocast(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Cast by hand, for operators registered from Python know no autocast."""
    kind = one.device.type
    if kind == "meta" or one.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return one, other
    dtype = torch.get_autocast_dtype(kind)
    return one.to(dtype), other.to(dtype)
