"""A shared expert: the dense block beside the chosen experts that every token goes through."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from fedmoe_core.layer.state import INIT_STD


class SharedExpert(nn.Module):
    """y = W_out (silu(gate) * up), [gate; up] = W_in x, times sigmoid(w x) where it is gated.

    It is not an expert of the router: each owner of the layer holds and runs it, and it counts as trunk. DeepSeek and
    Qwen have it; Qwen2-MoE's and Qwen3-Next's are gated. Pass it as ``MoE(shared=...)``, or any module of your own
    that maps (T, H) to (T, H).

    Attributes:
        w_in: (2I, H), the gate's rows first.
        w_out: (H, I).
        gate: (1, H), or None.

    Example:
        >>> SharedExpert(8, 16, gated=True)(torch.zeros(5, 8)).shape
        torch.Size([5, 8])
    """

    gate: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        gated: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Make a shared expert with fresh normal weights; its width counts all shared experts of a layer together."""
        super().__init__()

        def fresh(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device).normal_(std=INIT_STD))

        self.w_in = fresh(2 * intermediate_size, hidden_size)
        self.w_out = fresh(hidden_size, intermediate_size)
        self.gate = fresh(1, hidden_size) if gated else None

    def reset_parameters(self) -> None:
        """Give the shared expert fresh weights where they are, after ``to_empty`` for example."""
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(std=INIT_STD)

    def forward(self, x_TH: Tensor) -> Tensor:
        """Return (T, H)."""
        gate_TI, up_TI = linear(x_TH, self.w_in).chunk(2, dim=-1)
        y_TH = linear(silu(gate_TI) * up_TI, self.w_out)
        return y_TH if self.gate is None else y_TH * linear(x_TH, self.gate).sigmoid()
