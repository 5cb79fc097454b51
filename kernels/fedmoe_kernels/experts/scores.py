"""How much each expert matters, summed by both passes of `moe_mlp` themselves, for frozen experts too.

With s the routing weight of a row, dS its gradient and z the row's pre-activation, per slot and exactly:
    sum of s * dS   = <W_out, dW_out> + <b_out, db_out>
    sum of <z, dz>  = <W_in, dW_in> + <b_in, db_in>
where dW is what the weight gradient is, or would be for a frozen slot. These are first-order Taylor importances, the
change of the loss if the expert's output (or its first matrix) were scaled to zero; measured to rank experts best in
absolute value [E].

The forward adds what needs no loss, with f(x) the expert's output for the row:
    sum of |s| * ||f(x)||
Divided by the rows it is REAP, the router-weighted expert activation of arXiv 2510.13999 [N].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_POWERS = (0, 1, 1, 2, 1, 2, 0)  # of the loss scale in rows, taylor, taylor_abs, fisher, taylor_in, grad_sq, reap


class ExpertScores:
    """Importance sums of one layer's B slots, kept as the gradient of one float32 leaf.

    `moe_mlp(..., scores=scores)` reads the leaf without using its value, and its backward returns the sums as the
    leaf's gradient. So autograd adds up micro-batches, the operator stays functional, and recomputation under
    gradient checkpointing cannot count twice: only a backward adds, also what its forward has measured.

    A backward whose importance is not finite, such as one that a loss scaler will skip, adds its rows, its finite REAP
    terms and nothing else.
    Where the loss is multiplied by a scale, say so before each backward with `set_loss_scale`.

    Attributes:
        leaf_B7: (B, 7) float32, zero, requires_grad. Columns: rows, taylor, taylor_abs, fisher, taylor_in, grad_sq and
            reap.
        unscale_7: (7,) float32, what a backward's columns are multiplied by; None = ones.

    Args:
        num_slots: B.
        device: where the experts are.

    Raises:
        ValueError: without any slot.

    Example:
        >>> import torch
        >>> from fedmoe_kernels import moe_mlp, route
        >>> scores, w_in, w_out = ExpertScores(2), torch.ones(2, 3, 2), torch.ones(2, 2, 3)
        >>> routing = route(torch.tensor([[1.0, 0.0], [0.0, 3.0], [0.0, 2.0]]), 1)  # one token for expert 0, two for 1
        >>> moe_mlp(torch.ones(3, 2), routing, w_in, w_out, activation="relu", scores=scores).sum().backward()
        >>> scores.rows_B, scores.taylor_abs_B
        (tensor([1., 2.]), tensor([12., 24.]))
    """

    def __init__(self, num_slots: int, *, device: torch.device | str = "cpu") -> None:
        if num_slots < 1:
            raise ValueError(f"num_slots is {num_slots}; importance sums need at least one slot")
        self.leaf_B7 = torch.zeros(num_slots, 7, dtype=torch.float32, device=device, requires_grad=True)
        self.unscale_7: Tensor | None = None

    @property
    def num_slots(self) -> int:
        """B."""
        return self.leaf_B7.shape[0]

    @property
    def rows_B(self) -> Tensor:
        """Rows that each slot ran; exact up to 2^24."""
        return self._column(0)

    @property
    def taylor_B(self) -> Tensor:
        """Sum over rows of s * dS, signed; terms of opposite sign cancel."""
        return self._column(1)

    @property
    def taylor_abs_B(self) -> Tensor:
        """Sum over rows of |s * dS|."""
        return self._column(2)

    @property
    def fisher_B(self) -> Tensor:
        """Sum over rows of (s * dS)^2, the empirical Fisher information of the gate per row."""
        return self._column(3)

    @property
    def taylor_in_B(self) -> Tensor:
        """Sum over rows of <z, dz>, z with its bias."""
        return self._column(4)

    @property
    def grad_sq_B(self) -> Tensor:
        """||dW_in||^2 + ||dW_out||^2 of each backward, summed over backwards; with adapters those of the slot's four
        factors; 0 for slots that get no weight gradient."""
        return self._column(5)

    @property
    def reap_B(self) -> Tensor:
        """Sum over rows of |s| * ||f(x)||, the norm of what the expert adds to the token; / `rows_B` it is REAP.

        Of the outputs as they are stored in x's dtype; a slot where one is not finite adds 0 in that backward.
        """
        return self._column(6)

    def set_loss_scale(self, scale: float | Tensor) -> None:
        """Say what the loss of the next backwards is multiplied by, so that the sums are those of the loss itself.

        It holds until the next call. Three of the sums are linear in the scale, and two grow with its square; each
        backward's are divided by it before they are added. Rows and REAP know no loss.

        Args:
            scale: as a loss scaler says, `scaler.get_scale()`; a tensor () is not read on the host.

        Raises:
            ValueError: a number that is not positive and finite.

        Example:
            >>> import torch
            >>> scores = ExpertScores(2)
            >>> scores.set_loss_scale(1024.0)
            >>> scores.unscale_7[:3].tolist()  # rows, taylor, taylor_abs
            [1.0, 0.0009765625, 0.0009765625]
        """
        if not isinstance(scale, Tensor) and not 0 < scale < math.inf:
            raise ValueError(f"scale is {scale}; give the positive number that the loss is multiplied by")
        place = self.leaf_B7.device
        factor = torch.as_tensor(scale, dtype=torch.float64, device=place).detach().reshape(()).reciprocal()
        self.unscale_7 = torch.stack([factor**power for power in _POWERS]).float()

    def operand(self) -> Tensor:
        """Return the (B, 7) that the operator takes; its gradient reaches the leaf divided by the loss scale."""
        return self.leaf_B7 if self.unscale_7 is None else self.leaf_B7 * self.unscale_7

    def reset(self) -> None:
        """Forget all sums."""
        self.leaf_B7.grad = None

    def _column(self, index: int) -> Tensor:
        grad_B6 = self.leaf_B7.grad
        return (torch.zeros_like(self.leaf_B7.detach()) if grad_B6 is None else grad_B6.detach())[:, index]


def finite_only(sums_B6: Tensor, reap_B: Tensor) -> Tensor:
    """Join a backward's sums and its forward's, (B, 7): rows; importance, or nothing where any of it is not finite;
    REAP where it is finite. Reads no value."""
    rows_B1, importance_B5 = sums_B6[:, :1], sums_B6[:, 1:]
    kept_B5 = torch.where(importance_B5.isfinite().all(), importance_B5, 0.0)
    return torch.cat([rows_B1, kept_B5, torch.where(reap_B.isfinite(), reap_B, 0.0)[:, None]], dim=1)
