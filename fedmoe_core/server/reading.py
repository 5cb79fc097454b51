"""What a client's result must be made of before an algorithm reads it: it follows from the plan and the model alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields

import numpy as np
import torch
from torch import Tensor

from fedmoe_core.base.tensor_key import DENSE, TensorKey
from fedmoe_core.client.traffic import kind_of
from fedmoe_core.layer.lora import FACTORS
from fedmoe_core.layer.state import BIASES, MATRICES, STEERING
from fedmoe_core.messages.measure import LARGEST_MEASURE, misanswered
from fedmoe_core.messages.plan import ExpertPlan
from fedmoe_core.messages.profile import ExpertFeedback
from fedmoe_core.messages.result import LocalResult
from fedmoe_core.model.spec import ModelSpec

HALF = (torch.float16, torch.bfloat16)  # what was trained in these may come in float32 too
Form = tuple[tuple[int, ...], torch.dtype]


def unlike(plan: ExpertPlan, result: LocalResult, spec: ModelSpec) -> str:
    """Return in one sentence what of a result is not as its plan asks; empty where an algorithm may read it.

    Names, shapes and dtypes of all tensors are looked at, and the numbers of those that ``server.admission`` never
    sees: what probes answered, what stays with the client, and how its tokens fared.

    Args:
        plan: what was asked.
        result: what came; not trusted.
        spec: of the global model.
    """
    sent, kept = trained_forms(plan, spec)
    for key in sorted(kept.keys() ^ result.kept.keys()):
        return f"{key!r:.80} {'is missing among' if key in kept else 'is not one of'} the tensors that its plan keeps"
    for key, form in kept.items():
        if fault := _fault(key, result.kept[key], form):
            return fault
        if not bool((result.kept[key].abs() <= LARGEST_MEASURE).all()):  # NaN is not
            return f"{key} holds NaN, infinity or a number above {LARGEST_MEASURE:g}"
    for key, delta in result.deltas.items():
        if key not in sent:
            return f"unknown key {key!r:.80}: it is not among the tensors that this plan trains"
        if fault := _fault(key, delta, sent[key]):
            return fault
    shape_LE = plan.permitted_LE.shape
    return misanswered(plan.extras.measures, result.probed, shape_LE) or _misfared(result.feedback, shape_LE)


def trained_forms(plan: ExpertPlan, spec: ModelSpec) -> tuple[dict[str, Form], dict[str, Form]]:
    """Return shape and dtype of every change that a client of this plan may send, and of what it keeps, by key."""
    sent = {param.key: (tuple(param.shape), param.dtype) for param in spec.params if param.kind == "dense"}
    kept: dict[str, Form] = {}
    for key, form in _of_layers(plan, spec):
        (kept if kind_of(key) in plan.extras.keeps else sent)[key] = form
    for key, form in _unknown_to_the_state(plan, spec):
        kept[key] = form
    return sent, kept


def _of_layers(plan: ExpertPlan, spec: ModelSpec) -> Iterator[tuple[str, Form]]:
    """What trains of the state's own tensors: a row for each trainable expert, of adapters the plan's ranks."""
    rank, counts_L = plan.extras.lora_rank, plan.trainable_LE.sum(axis=1).tolist()
    adapted = rank is not None or any(param.name in FACTORS for param in spec.params if param.layer != DENSE)
    for param in spec.params:
        if param.layer == DENSE or not (count := counts_L[param.layer]):
            continue
        shape, name = param.shape[1:], param.name
        if name in FACTORS and rank is not None:
            shape = (rank, shape[1]) if name.startswith("a_") else (shape[0], rank)
        trains = name in FACTORS or (not adapted and name in (*MATRICES, *BIASES))
        if trains or (name in STEERING and plan.extras.train_router):
            yield param.key, ((count, *shape), param.dtype)


def _unknown_to_the_state(plan: ExpertPlan, spec: ModelSpec) -> Iterator[tuple[str, Form]]:
    """What trains for a round alone: adapters that the state does not have, and factors of the layers' outputs."""
    rank, counts_L = plan.extras.lora_rank, plan.trainable_LE.sum(axis=1).tolist()
    for param in spec.params:
        trains = param.kind == "expert" and param.name in MATRICES and counts_L[param.layer] > 0
        if rank is not None and trains:
            count, side, (rows, columns) = counts_L[param.layer], param.name.removeprefix("w_"), param.shape[1:]
            yield str(TensorKey(param.layer, f"a_{side}")), ((count, rank, columns), param.dtype)
            yield str(TensorKey(param.layer, f"b_{side}")), ((count, rows, rank), param.dtype)
    if plan.extras.out_scale_L is not None:
        double = any(param.dtype == torch.float64 for param in spec.params if param.layer != DENSE)
        for key in spec.keys_of("out_scale"):
            yield key, ((), torch.float64 if double else torch.float32)


def _fault(key: str, tensor: Tensor, form: Form) -> str:
    shape, dtype = form
    if type(tensor) is not Tensor or tuple(tensor.shape) != shape:
        return f"{key} is not a tensor of shape {shape}"
    if tensor.dtype != dtype and not (dtype in HALF and tensor.dtype == torch.float32):
        return f"{key} has dtype {tensor.dtype}, not {dtype}"
    return ""


def _misfared(feedback: ExpertFeedback | None, shape_LE: tuple[int, ...]) -> str:
    if feedback is None:
        return ""
    tables: Mapping[str, object] = {item.name: getattr(feedback, item.name) for item in fields(ExpertFeedback)}
    for name, table_LE in tables.items():
        if type(table_LE) is not np.ndarray or table_LE.dtype != np.float64 or table_LE.shape != shape_LE:
            return f"feedback.{name} is not an array of float64 of shape {shape_LE}"
        if not ((table_LE >= 0) & (table_LE <= LARGEST_MEASURE)).all():
            return f"feedback.{name} holds NaN, infinity or a number outside 0 to {LARGEST_MEASURE:g}"
    if (feedback.correct_LE > feedback.rows_LE).any():
        return "feedback.correct_LE is above feedback.rows_LE, of which it is a part"
    return ""
