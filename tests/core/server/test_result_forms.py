"""A result that is not as its plan asks never reaches an algorithm: the client has failed, by name."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from hand_made import EXPERTS, HIDDEN, INNER, LAYERS, TRAINED, plan_for, population, result_for

from fedmoe_core.algorithms.flex_moe.flex_moe import LocalFeedback
from fedmoe_core.algorithms.flux.forward_gradients import ForwardEstimates
from fedmoe_core.algorithms.flux.four_bit_profile import QuantizedProfile
from fedmoe_core.algorithms.hfedmoe import HFedMoE
from fedmoe_core.messages.measure import Measure, misanswered
from fedmoe_core.messages.plan import Extras
from fedmoe_core.messages.profile import ExpertFeedback
from fedmoe_core.messages.result import LocalResult
from fedmoe_core.messages.update import Weights
from fedmoe_core.server.reading import trained_forms, unlike

SHAPE_LE = (LAYERS, EXPERTS)
F64 = torch.float64


def table(value: float = 0.25, shape: tuple[int, ...] = SHAPE_LE) -> torch.Tensor:
    return torch.full(shape, value, dtype=F64)


@dataclass(frozen=True)
class Reading(HFedMoE):
    """Writes down what reaches it."""

    read: list[Any] = field(default_factory=list)

    def client(self, plan: Any, result: LocalResult) -> Weights:
        self.read.append(result)
        return super().client(plan, result)


def asking() -> Any:
    extras = Extras(before=QuantizedProfile(), after=ForwardEstimates(((0, 1),), 0.1, 1), keeps=frozenset({"router"}))
    return replace(plan_for(0), extras=extras)


def fine() -> LocalResult:
    result = result_for(0)
    router = {key: delta for key, delta in result.deltas.items() if key.endswith("router")}
    deltas = {key: delta for key, delta in result.deltas.items() if key not in router}
    probed = {"freq": table(), "attention": table(7.0), "norm_sq": table(1e20)}
    return replace(result, deltas=deltas, kept=router, probed=probed)


def probed(name: str, value: Any) -> Callable[[LocalResult], LocalResult]:
    return lambda result: replace(result, probed={**result.probed, name: value})


def kept(key: str, value: Any) -> Callable[[LocalResult], LocalResult]:
    return lambda result: replace(result, kept={**result.kept, key: value})


def sent(key: str, value: Any) -> Callable[[LocalResult], LocalResult]:
    return lambda result: replace(result, deltas={**result.deltas, key: value})


def fared(*tables_LE: np.ndarray) -> Callable[[LocalResult], LocalResult]:
    return lambda result: replace(result, feedback=ExpertFeedback(*tables_LE))


ONES_LE = np.ones(SHAPE_LE)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (probed("freq", table(math.nan)), "'freq' holds NaN"),
        (probed("freq", table(1.5)), "'freq' reaches 1.5 to 1.5, not 0 to 1"),
        (probed("attention", table(-0.1)), "'attention' reaches -0.1"),
        (probed("norm_sq", table(1e31)), "'norm_sq' reaches 1e\\+31"),
        (probed("norm_sq", table().float()), "'norm_sq' is not a tensor of float64"),
        (probed("norm_sq", table(shape=(1, EXPERTS))), r"of shape \(2, 4\)"),
        (probed("norm_sq", ONES_LE), "is not a tensor"),
        (probed("more", table()), "'more' is not one that its plan asks for"),
        (lambda r: replace(r, probed={"freq": table(), "attention": table()}), "'norm_sq' is missing"),
        (kept("moe.0.w_in", table()), "'moe.0.w_in' is not one of the tensors that its plan keeps"),
        (lambda r: replace(r, kept={}), "'moe.0.router' is missing among"),
        (kept("moe.0.router", torch.full((2, HIDDEN), math.inf, dtype=F64)), "moe.0.router holds NaN, infinity"),
        (kept("moe.0.router", torch.zeros(2, HIDDEN)), "has dtype torch.float32"),
        (kept("moe.0.router", torch.zeros(1, HIDDEN, dtype=F64)), r"not a tensor of shape \(2, 3\)"),
        (sent("moe.0.router", torch.zeros(2, HIDDEN, dtype=F64)), "unknown key 'moe.0.router'"),
        (sent("moe.0.w_in", torch.zeros(1, 1, 1, dtype=F64)), r"moe.0.w_in is not a tensor of shape \(2, 10, 3\)"),
        (fared(ONES_LE, ONES_LE * math.nan, ONES_LE), "feedback.loss_LE holds NaN"),
        (fared(ONES_LE, ONES_LE, ONES_LE * 2), "feedback.correct_LE is above"),
        (fared(ONES_LE, ONES_LE, np.ones((1, 1))), r"feedback.correct_LE is not an array of float64 of shape \(2, 4\)"),
    ],
)
def test_inv11_what_is_not_as_asked_fails_its_client_and_is_not_read(
    change: Callable[[LocalResult], LocalResult], said: str
) -> None:
    algorithm, plan = Reading(population()), asking()
    assert algorithm.answer(plan, fine()).status == "ok"
    assert len(algorithm.read) == 1
    update = algorithm.answer(plan, change(fine()))
    assert update.status == "failed"
    assert not update.deltas
    assert len(algorithm.read) == 1
    assert re.search(said, update.error)


def test_a_part_that_is_above_its_whole_is_refused() -> None:
    asked = LocalFeedback.measures
    given = {"rows": table(2.0), "loss": table(9.0), "right": table(2.0)}
    assert misanswered(asked, given, SHAPE_LE) == ""
    given["right"][1, 3] = 2.5
    assert misanswered(asked, given, SHAPE_LE) == "its probe's 'right' is above 'rows', of which it is a part"


def test_an_axis_that_is_not_known_is_an_error_of_the_system() -> None:
    with pytest.raises(ValueError, match="axis 'H'"):
        Measure("LH").shape(SHAPE_LE)
    assert Measure("").shape(SHAPE_LE) == ()


def test_adapters_of_a_round_stay_and_whole_experts_are_not_sent() -> None:
    plan = replace(plan_for(2), extras=Extras(lora_rank=2, out_scale_L=(1.0, 1.0)))
    spec, counts = population().spec, [int(trained_E.sum()) for trained_E in TRAINED[2]]
    sent, kept = trained_forms(plan, spec)
    shapes = {key: shape for key, (shape, _) in kept.items()}
    wanted: dict[str, tuple[int, ...]] = {f"moe.{layer}.out_scale": () for layer in range(LAYERS)}
    for layer, count in enumerate(counts):
        wanted |= {f"moe.{layer}.a_in": (count, 2, HIDDEN), f"moe.{layer}.b_in": (count, 2 * INNER, 2)}
        wanted |= {f"moe.{layer}.a_out": (count, 2, INNER), f"moe.{layer}.b_out": (count, HIDDEN, 2)}
    assert shapes == wanted
    assert {key for key in sent if key.startswith("moe")} == {"moe.0.router", "moe.1.router"}


def test_a_result_in_half_precision_may_come_in_float32() -> None:
    spec = population().spec
    half = replace(spec, params=tuple(replace(param, dtype=torch.bfloat16) for param in spec.params))
    result = result_for(0)
    for dtype, taken in ((torch.bfloat16, True), (torch.float32, True), (torch.float64, False)):
        sent = replace(result, deltas={key: delta.to(dtype) for key, delta in result.deltas.items()})
        assert (unlike(plan_for(0), sent, half) == "") == taken
