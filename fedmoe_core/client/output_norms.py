"""How large what each expert adds to its tokens is: sums of router weight times the norm of the expert's output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from fedmoe_core.layer.moe import MoE
from fedmoe_core.layer.recording import listening
from fedmoe_kernels.routing.record import Routing
from fedmoe_kernels.routing.rules import compute_dtype


class OutputNorms:
    """Sums over rows of g_e(x) ||f_e(x)||, by layer and expert, added up over micro-batches; made by ``output_norms``.

    g is the router's weight of the row and f_e the expert, so this is the norm of what the expert adds to the token.
    Divided by the expert's rows it is REAP, the router-weighted expert activation of arXiv 2510.13999 [N].
    """

    def __init__(self, layers: Sequence[MoE]) -> None:
        self._last = tuple(_LastNorms(layer) for layer in layers)
        self._sums: list[Tensor] = []

    def add_batch(self) -> None:
        """Take the forward of each layer that just ran; call once per micro-batch.

        Raises:
            ValueError: a layer has not run since the last call.
        """
        last = [heard.take() for heard in self._last]
        self._sums = [total + new for total, new in zip(self._sums, last, strict=True)] if self._sums else last

    def finish(self) -> np.ndarray:
        """Return the sums in global coordinates, float64 (L, E). One host sync a layer."""
        return np.stack([sum_E.cpu().numpy() for sum_E in self._sums])


@contextmanager
def output_norms(layers: Sequence[MoE]) -> Iterator[OutputNorms]:
    """Measure, within the block, the experts' outputs in every forward of ``layers``.

    The operator runs once more for each choice of a token, so that outputs are seen one by one: together about the
    operations of one more forward of the experts, and T * H numbers at a time. Nothing else hears these forwards, see
    ``recording``.

    Example:
        >>> layer = MoE(8, 16, 4, 2)
        >>> with output_norms([layer]) as norms:
        ...     y = layer(torch.zeros(5, 8))
        ...     norms.add_batch()
        >>> norms.finish()
        array([[0., 0., 0., 0.]])
    """
    norms = OutputNorms(layers)
    with listening(layers, norms._last):
        yield norms


class _LastNorms:
    """One layer's last forward; a later one writes over it, so that a forward made again in a backward counts once."""

    def __init__(self, layer: MoE) -> None:
        self._layer = layer
        self._sum_E: Tensor | None = None

    @torch.no_grad()
    def __call__(self, _: Tensor, routing: Routing, x_TH: Tensor) -> None:
        sum_E = torch.zeros(self._layer.num_experts, dtype=torch.float64, device=x_TH.device)
        for experts_T1, weights_T1 in zip(routing.experts_TK.split(1, 1), routing.weights_TK.split(1, 1), strict=True):
            y_TH = self._layer.run_experts(x_TH, Routing.from_topk(experts_T1, weights_T1, self._layer.slot_map))
            norm_T = torch.linalg.vector_norm(y_TH, dim=1, dtype=compute_dtype(y_TH.dtype)).double()
            # A token without this choice has the index -1 and an output of 0, which may go anywhere.
            sum_E.index_add_(0, experts_T1[:, 0].clamp(min=0), norm_T)
        self._sum_E = sum_E

    def take(self) -> Tensor:
        """Return the sums of the last forward, (E,) float64, and let go of them."""
        sum_E, self._sum_E = self._sum_E, None
        if sum_E is None:
            raise ValueError("an MoE layer has not run since the last batch; run a forward, then add_batch once")
        return sum_E
