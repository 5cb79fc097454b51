"""Drawn routing calls, and what they must agree on with the loops of reference.py."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from fedmoe_kernels import RouterStats, Routing, SlotMap

RULES = [("softmax", True), ("softmax", False), ("topk_softmax", True), ("sigmoid", True), ("sigmoid", False)]
INDEX_FIELDS = ("experts_TK", "slots_TK", "rows_TK", "tokens_R", "places_R", "offsets_B1")
STATS_FIELDS = tuple(field.name for field in fields(RouterStats))


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def mask(*bits: int) -> Tensor:
    return torch.tensor(bits, dtype=torch.bool)


def cohort(C: int, E: int, T: int, *, seed: int = 0) -> tuple[SlotMap, Tensor]:
    """A map of clients that each hold about half of the experts, and interleaved tokens."""
    generator = torch.Generator().manual_seed(seed)
    permitted_CE = torch.rand(C, E, generator=generator) < 0.5
    permitted_CE[torch.arange(C), torch.randint(E, (C,), generator=generator)] = True
    trainable_CE = permitted_CE & (torch.rand(C, E, generator=generator) < 0.5)
    return SlotMap.build(permitted_CE, trainable_CE), torch.randint(C, (T,), generator=generator)


def relative(got: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth; the difference alone where the truth is 0."""
    truth = truth.double()
    return float((got.double() - truth).norm() / (truth.norm() if truth.any() else 1.0))


def assert_routed(got: Routing, truth: Any, *, tol: float = 1e-6) -> None:
    for name in INDEX_FIELDS:
        value = getattr(got, name)
        assert value.dtype == torch.int64, name
        assert torch.equal(value, getattr(truth, name)), name
    assert got.weights_TK.dtype == torch.float32
    assert relative(got.weights_TK, truth.weights_TK) < tol
    assert (got.weights_TK[got.rows_TK < 0] == 0).all()


def assert_counted(got: RouterStats | None, truth: dict[str, Tensor] | RouterStats, *, tol: float = 1e-6) -> None:
    """Counts are exact; sums are of a float32 softmax, the truth's of a float64 one."""
    for name in STATS_FIELDS:
        value, expected = getattr(got, name), truth[name] if isinstance(truth, dict) else getattr(truth, name)
        assert value.dtype == torch.float64, name
        assert value.shape == expected.shape, name
        assert relative(value, expected) < (1e-15 if name in ("tokens", "hits_E") else tol), name


def assert_same_bits(one: Routing, two: Routing) -> None:
    for name in (*INDEX_FIELDS, "weights_TK"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name
    for name in STATS_FIELDS if one.stats is not None else ():
        assert torch.equal(getattr(one.stats, name), getattr(two.stats, name)), name
