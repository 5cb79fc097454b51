"""The shapes and cases that every benchmark of the experts runs, and the data they run on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """One MoE layer: T tokens, H hidden, I intermediate, E experts, K top-k; its name says what it is like."""

    name: str
    T: int
    H: int
    I: int  # noqa: E741 - the house's letter for the intermediate size
    E: int
    K: int

    @property
    def flops(self) -> int:
        """Forward + backward of T * K rows through three (H, I) matrices, all trained: 18 * T * K * H * I."""
        return 18 * self.T * self.K * self.H * self.I


SHAPES = (
    Shape("demo", 4096, 256, 512, 16, 2),
    Shape("edge", 512, 512, 256, 16, 2),
    Shape("fine", 2048, 256, 128, 64, 8),
    Shape("large", 4096, 512, 1024, 8, 2),
)


@dataclass(frozen=True)
class Case:
    """Which experts a client holds and trains.

    all: every expert permitted and trainable. permitted: a quarter of the experts permitted (at least K), all of them
    trainable. trainable: every expert permitted, a quarter of them trainable.
    """

    name: str
    permitted: float
    trainable: float


CASES = (Case("all", 1.0, 1.0), Case("permitted", 0.25, 1.0), Case("trainable", 1.0, 0.25))


@dataclass(frozen=True)
class Problem:
    """The tensors of one (shape, case): what each contender gets, full storage in expert order.

    With a quarter permitted the ids in `experts_TK` are restricted to the permitted experts, so fedmoe and its peers
    run exactly the same rows; a peer holds all E experts (it has no compact form), fedmoe only the permitted ones.
    """

    shape: Shape
    case: Case
    x_TH: Tensor
    dy_TH: Tensor
    experts_TK: Tensor
    weights_TK: Tensor
    w_in: Tensor
    w_out: Tensor
    permitted_E: Tensor
    trainable_E: Tensor

    @property
    def flops(self) -> float:
        """What the case has to compute: the weight gradients of frozen experts' rows are not counted."""
        rows_E = torch.bincount(self.experts_TK.flatten(), minlength=self.shape.E)
        tau = float(rows_E[self.trainable_E].sum() / rows_E.sum())
        return self.shape.flops * (2 + tau) / 3


def problem(shape: Shape, case: Case, *, seed: int = 0) -> Problem:
    """Draw one problem: O(1) float32 data, uniform routing over the permitted experts, K different ones a token."""
    draw = torch.Generator().manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw)

    held = max(shape.K, int(shape.E * case.permitted))
    permitted_E = torch.zeros(shape.E, dtype=torch.bool)
    permitted_E[torch.randperm(shape.E, generator=draw)[:held]] = True
    ids = permitted_E.nonzero().flatten()
    trainable_E = torch.zeros_like(permitted_E)
    trainable_E[ids[torch.randperm(held, generator=draw)[: max(1, int(held * case.trainable))]]] = True
    choice_TK = torch.rand(shape.T, held, generator=draw).topk(shape.K).indices
    return Problem(
        shape=shape,
        case=case,
        x_TH=randn(shape.T, shape.H),
        dy_TH=randn(shape.T, shape.H),
        experts_TK=ids[choice_TK],
        weights_TK=torch.rand(shape.T, shape.K, generator=draw).softmax(-1),
        w_in=randn(shape.E, 2 * shape.I, shape.H) / shape.H**0.5,
        w_out=randn(shape.E, shape.H, shape.I) / shape.I**0.5,
        permitted_E=permitted_E,
        trainable_E=trainable_E,
    )
