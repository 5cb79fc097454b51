"""A plain torch model and rows small enough that a whole run takes a second; commands name it as an adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedmoe_core.data.rows import Rows
from fedmoe_core.model.plain import PlainModel, plain


def blobs(rows: int, *, seed: int = 0) -> Rows:
    """Three classes of points in 5 dimensions."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (rows,), generator=generator)
    centers = torch.eye(3, 5) * 3
    return centers[labels] + torch.randn(rows, 5, generator=generator), labels


def network() -> nn.Module:
    """Two layers."""
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def normed() -> nn.Module:
    """Running means, which are averaged, and a count, which is not."""
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def dropping() -> nn.Module:
    """Dropout, whose draws cannot be made for many clients at once."""
    return nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 3))


def cross_entropy(model: nn.Module, batch: Rows) -> Tensor:
    """Mean cross entropy."""
    return functional.cross_entropy(model(batch[0]), batch[1])


def correct(model: nn.Module, batch: Rows) -> Tensor:
    """Right predictions."""
    return (model(batch[0]).argmax(1) == batch[1]).sum()


def sgd(parameters: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
    """Plain SGD."""
    return torch.optim.SGD(parameters, lr)


def momentum(parameters: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
    """SGD with momentum."""
    return torch.optim.SGD(parameters, lr, momentum=0.9)


def made(model_fn: Callable[[], nn.Module] = network, rows: int = 90, **given: object) -> PlainModel:
    """Make the model of the tests; ``given`` replaces what ``plain`` is given."""
    words = {"train": blobs(rows), "test": blobs(40, seed=1), "correct_fn": correct, "optimizer_fn": sgd}
    return plain(model_fn, cross_entropy, **{**words, **given})  # type: ignore[arg-type]


adapter = made()
